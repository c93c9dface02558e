package io.github.etcdlock;

import static io.github.etcdlock.Outside.ETCD;
import static io.github.etcdlock.Outside.freshName;
import static io.github.etcdlock.Outside.keys;
import static io.github.etcdlock.Outside.until;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.github.etcdlock.Outside.Program;
import java.time.Duration;
import java.util.concurrent.atomic.AtomicInteger;
import org.junit.jupiter.api.DisplayNameGeneration;
import org.junit.jupiter.api.DisplayNameGenerator;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

@Timeout(120)
@DisplayNameGeneration(DisplayNameGenerator.ReplaceUnderscores.class)
class ProcessTest {
    private interface Work {
        void run() throws InterruptedException;
    }

    /** Says "ready" in its state, and ends with code 3. */
    static final class Ending {
        private static final AtomicInteger NUMBERS = new AtomicInteger();

        private static int n() {
            return NUMBERS.incrementAndGet();
        }

        private static void lockAndUnlock(Mutex mutex) throws InterruptedException {
            while (true) {
                try (Hold hold = mutex.lock()) {
                    hold.onLost(error -> {});
                }
            }
        }

        private static Thread daemon(Work work) {
            Thread thread = new Thread(() -> {
                try {
                    work.run();
                } catch (EtcdLockException | InterruptedException end) {
                    Thread.currentThread().interrupt();
                }
            });
            thread.setDaemon(true);
            return thread;
        }

        public static void main(String[] args) throws Exception {
            Session session = Session.connect(args[0], new Options().ttl(Duration.ofSeconds(30)));
            Mutex mutex = session.mutex(args[1]);
            if (args[2].equals("busy")) {
                for (int n = 0; n < 3; n++) daemon(() -> lockAndUnlock(session.mutex(args[1] + "/" + n()))).start();
                while (session.stats().getLocks() < 20) Thread.onSpinWait();
            } else {
                mutex.lock();
            }
            if (args[2].equals("waiting")) {
                Thread waiter = daemon(() -> session.mutex(args[1]).lock());
                waiter.start();
                while (waiter.getState() != Thread.State.WAITING) Thread.onSpinWait();
            }
            if (args[2].equals("futures")) {
                for (int n = 0; n < 100; n++) session.mutex(args[1]).lockAsync();
            }
            System.out.println("ready");
            System.exit(3);
        }
    }

    /** Holds until it is told to go on, and says what it believes then. */
    static final class Stopped {
        public static void main(String[] args) throws Exception {
            try (Session session = Session.connect(args[0], new Options().ttl(Duration.ofSeconds(2)))) {
                Hold hold = session.mutex(args[1]).lock();
                System.out.println(hold.getToken());
                System.in.read();
                String held = String.valueOf(hold.isHeld());
                String written = "written";
                try {
                    hold.put(args[1] + ".state", "late");
                } catch (LockLostException refused) {
                    written = "refused";
                }
                System.out.println(held + " " + written + " " + hold.remaining());
            }
        }
    }

    private static void signal(String name, Program program) throws Exception {
        assertEquals(0, new ProcessBuilder("kill", "-" + name, Long.toString(program.process.pid())).start().waitFor());
    }

    @ParameterizedTest
    @ValueSource(strings = {"holding", "waiting", "futures", "busy"})
    void row_29_the_end_of_the_process_releases_its_locks_without_a_word(String state) throws Exception {
        String name = freshName();
        try (Program program = new Program(Ending.class.getName(), ETCD, name, state)) {
            assertEquals("ready", program.says());
            assertEquals("3 ", program.end());
        }
        until(() -> keys(name).isEmpty());
    }

    @Test
    void row_29_a_signal_that_ends_the_process_releases_too() throws Exception {
        String name = freshName();
        try (Program program = new Program(Stopped.class.getName(), ETCD, name)) {
            program.says();
            signal("TERM", program);
            assertEquals("143 ", program.end());
        }
        until(() -> keys(name).isEmpty());
    }

    @Test
    void row_1_a_holder_that_was_stopped_past_its_ttl_knows_at_its_first_call() throws Exception {
        String name = freshName();
        try (Program program = new Program(Stopped.class.getName(), ETCD, name); Session session = Session.connect(ETCD)) {
            long token = Long.parseLong(program.says());
            signal("STOP", program);
            try (Hold next = session.mutex(name).lock(Duration.ofSeconds(60))) {
                assertTrue(next.getToken() > token, "a fenced resource refuses the old one");
                next.put(name + ".state", "mine");
                program.process.getOutputStream().write('\n');
                program.process.getOutputStream().flush();
                signal("CONT", program);
                assertEquals("false refused PT0S", program.says());
                assertEquals("mine", next.get(name + ".state"));
            }
        }
    }
}
