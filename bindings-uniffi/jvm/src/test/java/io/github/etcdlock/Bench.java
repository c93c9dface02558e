package io.github.etcdlock;

/** Figures of one thread: a pair of lock and unlock, and the question whether a hold is held. */
final class Bench {
    private interface Work {
        void run() throws Exception;
    }

    private static String microseconds(int rounds, Work work) throws Exception {
        for (int n = 0; n < rounds; n++) work.run(); // the compiler warms up
        long start = System.nanoTime();
        for (int n = 0; n < rounds; n++) work.run();
        return String.format("%.2f us", (System.nanoTime() - start) / 1e3 / rounds);
    }

    public static void main(String[] args) throws Exception {
        for (String target : new String[] {"memory:", System.getenv("ETCDLOCK_ENDPOINTS")}) {
            try (Session session = Session.connect(target)) {
                Mutex mutex = session.mutex("/bench/jvm");
                System.out.println("JVM, " + target + ": lock and unlock " + microseconds(1000, () -> mutex.lock().unlock()));
                try (Hold hold = mutex.lock()) {
                    System.out.println("JVM, " + target + ": isHeld " + microseconds(1_000_000, hold::isHeld));
                }
            }
        }
    }

    private Bench() {}
}
