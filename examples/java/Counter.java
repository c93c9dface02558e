// Adds to a number in a file, together with any other programs, one at a time.
//
//     java -cp … Counter TARGET FILE ROUNDS lock|nolock

import io.github.etcdlock.Hold;
import io.github.etcdlock.Mutex;
import io.github.etcdlock.Options;
import io.github.etcdlock.Session;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.time.Duration;
import java.util.concurrent.locks.LockSupport;

final class Counter {
    private static long addOne(Path file) throws IOException {
        String text = Files.readString(file).trim();
        long value = (text.isEmpty() ? 0 : Long.parseLong(text)) + 1;
        LockSupport.parkNanos(200_000); // somebody else may come between
        // In place and always ten digits: one step, so that a reader never finds half a number.
        Files.writeString(file, String.format("%010d", value), StandardOpenOption.WRITE);
        return value;
    }

    public static void main(String[] args) throws Exception {
        if (args.length != 4) {
            System.err.println("usage: counter TARGET FILE ROUNDS lock|nolock");
            System.exit(64);
        }
        Path file = Path.of(args[1]);
        int rounds = Integer.parseInt(args[2]);
        try (Session session = Session.connect(args[0], new Options().ttl(Duration.ofSeconds(10)))) {
            Mutex mutex = session.mutex("/demo/counter");
            for (int round = 0; round < rounds; round++) {
                if (args[3].equals("nolock")) {
                    System.out.println("token=- value=" + addOne(file) + " waited_us=0");
                    continue;
                }
                long start = System.nanoTime();
                try (Hold hold = mutex.lock()) {
                    long waited = (System.nanoTime() - start) / 1000;
                    System.out.println("token=" + hold.getToken() + " value=" + addOne(file) + " waited_us=" + waited);
                }
            }
        }
    }
}
