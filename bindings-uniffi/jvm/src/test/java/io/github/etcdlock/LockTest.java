package io.github.etcdlock;

import static io.github.etcdlock.Outside.ETCD;
import static io.github.etcdlock.Outside.freshName;
import static io.github.etcdlock.Outside.keys;
import static io.github.etcdlock.Outside.until;
import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertInstanceOf;
import static org.junit.jupiter.api.Assertions.assertNotNull;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.time.Duration;
import java.util.ArrayList;
import java.util.List;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.CancellationException;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionException;
import java.util.concurrent.ExecutionException;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.TimeoutException;
import java.util.concurrent.atomic.AtomicBoolean;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicReference;
import java.util.concurrent.locks.Lock;
import java.util.logging.Handler;
import java.util.logging.LogRecord;
import java.util.logging.Logger;
import org.junit.jupiter.api.DisplayNameGeneration;
import org.junit.jupiter.api.DisplayNameGenerator;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.MethodSource;

@Timeout(120)
@DisplayNameGeneration(DisplayNameGenerator.ReplaceUnderscores.class)
class LockTest {
    private static final String TARGETS = "io.github.etcdlock.Outside#targets";

    private static boolean isEtcd(String target) {
        return target.equals(ETCD);
    }

    private static void nothingIsLeft(String target, Session session, String name) throws Exception {
        if (isEtcd(target)) until(() -> keys(name).isEmpty());
        until(() -> session.inspect(name).isEmpty());
    }

    private interface Work {
        void run() throws Exception;
    }

    /** A thread, and what it ended with. */
    private static final class Worker extends Thread {
        private final Work work;
        private volatile Throwable error;

        Worker(Work work) {
            this.work = work;
            start();
        }

        @Override
        public void run() {
            try {
                work.run();
            } catch (Throwable error) {
                this.error = error;
            }
        }

        Throwable end() throws InterruptedException {
            join(60_000);
            assertFalse(isAlive(), "it hangs");
            return error;
        }
    }

    /** Until so many wait in this process behind the holder, seen by the store's own queue. */
    private static void untilParked(Thread thread) throws Exception {
        until(() -> thread.getState() == Thread.State.WAITING);
    }

    @ParameterizedTest
    @MethodSource(TARGETS)
    void a_lock_is_held_until_it_is_unlocked_and_tokens_rise(String target) throws Exception {
        try (Session session = Session.connect(target, new Options().ttl(Duration.ofSeconds(10)).owner("me"))) {
            Mutex mutex = session.mutex(freshName());
            Hold hold = mutex.lock();
            assertTrue(hold.isHeld() && mutex.isHeld());
            hold.check();
            assertEquals(hold.getToken(), mutex.getToken());
            assertEquals(mutex.getName(), hold.getName());
            assertTrue(hold.remaining().toMillis() > 1000 && hold.remaining().toMillis() <= 10_000);
            assertNull(session.mutex(mutex.getName()).tryLock());
            Contender holder = session.inspect(mutex.getName()).get(0);
            assertTrue(holder.isHolder());
            assertEquals("me", holder.getOwner());
            assertEquals("jvm", holder.getLanguage());
            assertEquals(ProcessHandle.current().pid(), holder.getPid());
            assertEquals(hold.getToken(), holder.getToken());
            hold.unlock();
            assertFalse(hold.isHeld() || mutex.isHeld());
            assertNull(mutex.getToken());
            assertEquals(Duration.ZERO, hold.remaining());
            assertThrows(NotHeldException.class, hold::unlock);
            assertThrows(NotHeldException.class, mutex::unlock);
            assertThrows(NotHeldException.class, hold::check);
            hold.close();
            try (Hold next = mutex.tryLock()) {
                assertTrue(next.getToken() > hold.getToken());
            }
            mutex.lock();
            mutex.unlock();
            assertEquals(3, session.stats().getLocks());
            assertEquals(Duration.ofSeconds(10), session.getTtl());
            nothingIsLeft(target, session, mutex.getName());
        }
    }

    @ParameterizedTest
    @MethodSource(TARGETS)
    void a_timeout_leaves_nothing(String target) throws Exception {
        try (Session session = Session.connect(target); Session other = Session.connect(target)) {
            String name = freshName();
            Hold hold = session.mutex(name).lock();
            Mutex mutex = other.mutex(name);
            assertThrows(LockTimeoutException.class, () -> mutex.lock(Duration.ofMillis(50)));
            assertThrows(LockTimeoutException.class, () -> mutex.lock(Duration.ZERO));
            assertThrows(InvalidException.class, () -> mutex.lock(Duration.ofMillis(-1)));
            hold.unlock();
            nothingIsLeft(target, session, name);
        }
    }

    @ParameterizedTest
    @MethodSource(TARGETS)
    void an_interrupt_ends_the_wait_and_leaves_nothing(String target) throws Exception {
        try (Session session = Session.connect(target)) {
            String name = freshName();
            Hold hold = session.mutex(name).lock();
            AtomicBoolean flag = new AtomicBoolean();
            Worker waiter = new Worker(() -> {
                try {
                    session.mutex(name).lock();
                } finally {
                    flag.set(Thread.currentThread().isInterrupted());
                }
            });
            untilParked(waiter);
            waiter.interrupt();
            assertInstanceOf(InterruptedException.class, waiter.end());
            assertFalse(flag.get(), "as everywhere, the exception takes the flag");
            hold.unlock();
            nothingIsLeft(target, session, name);

            Thread.currentThread().interrupt();
            assertThrows(InterruptedException.class, () -> session.mutex(name).lock());
            nothingIsLeft(target, session, name);
        }
    }

    @ParameterizedTest
    @MethodSource(TARGETS)
    void an_interrupt_at_the_moment_of_the_grant_gives_the_hold_or_leaves_nothing(String target) throws Exception {
        try (Session session = Session.connect(target)) {
            String name = freshName();
            int interrupted = 0;
            for (int round = 0; round < 150; round++) {
                Hold first = session.mutex(name).lock();
                Worker waiter = new Worker(() -> session.mutex(name).lock().unlock());
                untilParked(waiter);
                CompletableFuture<Void> unlocked = first.unlockAsync();
                long until = System.nanoTime() + ThreadLocalRandom.current().nextInt(isEtcd(target) ? 2_000_000 : 200_000);
                while (System.nanoTime() < until) Thread.onSpinWait();
                waiter.interrupt();
                unlocked.get();
                Throwable error = waiter.end();
                if (error != null) {
                    assertInstanceOf(InterruptedException.class, error);
                    interrupted++;
                }
                // Whichever it was, the lock is free.
                session.mutex(name).lock(Duration.ofSeconds(30)).unlock();
            }
            System.out.println(target + ": " + interrupted + " of 150 were interrupted");
            nothingIsLeft(target, session, name);
        }
    }

    @ParameterizedTest
    @MethodSource(TARGETS)
    void an_interrupted_thread_can_unlock_and_stays_interrupted(String target) throws Exception {
        try (Session session = Session.connect(target)) {
            Mutex mutex = session.mutex(freshName());
            Hold hold = mutex.lock();
            Thread.currentThread().interrupt();
            hold.unlock();
            assertTrue(Thread.interrupted());
            nothingIsLeft(target, session, mutex.getName());
        }
    }

    @ParameterizedTest
    @MethodSource(TARGETS)
    void threads_exclude_each_other_through_one_mutex_and_through_many(String target) throws Exception {
        try (Session session = Session.connect(target)) {
            String name = freshName();
            Mutex shared = session.mutex(name);
            int rounds = isEtcd(target) ? 50 : 500;
            AtomicInteger inside = new AtomicInteger();
            long[] last = {0};
            List<Worker> workers = new ArrayList<>();
            for (int n = 0; n < 8; n++) {
                Mutex mutex = n % 2 == 0 ? shared : session.mutex(name);
                workers.add(new Worker(() -> {
                    for (int round = 0; round < rounds; round++) {
                        try (Hold hold = mutex.lock()) {
                            assertEquals(1, inside.incrementAndGet());
                            assertTrue(hold.getToken() > last[0], "tokens rise");
                            last[0] = hold.getToken();
                            inside.decrementAndGet();
                        }
                    }
                }));
            }
            for (Worker worker : workers) assertNull(worker.end());
            assertEquals(8 * rounds, session.stats().getLocks());
            nothingIsLeft(target, session, name);
        }
    }

    @ParameterizedTest
    @MethodSource(TARGETS)
    void guarded_writes_are_applied_only_while_the_lock_is_held(String target) throws Exception {
        try (Session session = Session.connect(target)) {
            String name = freshName();
            Hold hold = session.mutex(name).lock();
            String key = name + ".state";
            assertNull(hold.get(key));
            hold.put(key, "paid");
            assertEquals("paid", hold.get(key));
            byte[] bytes = {0, -1, 127};
            hold.put(key.getBytes(), bytes);
            assertArrayEquals(bytes, hold.get(key.getBytes()));
            assertArrayEquals(bytes, hold.getAsync(key.getBytes()).get());
            hold.deleteAsync(key.getBytes()).get();
            hold.putAsync(key.getBytes(), bytes).get();
            hold.delete(key);
            assertNull(hold.get(key));
            hold.unlock();
            assertThrows(NotHeldException.class, () -> hold.put(key, "late"));
        }
    }

    @Test
    void a_loss_is_heard_of_once_by_each_listener_and_the_guarded_write_is_refused() throws Exception {
        try (Session session = Session.connect(ETCD)) {
            String name = freshName();
            Hold hold = session.mutex(name).lock();
            BlockingQueue<String> heard = new LinkedBlockingQueue<>();
            hold.onLost(error -> heard.add("first " + error.getKind()));
            // It may block, and even lock.
            hold.onLost(error -> {
                try (Hold other = session.mutex(name + ".other").lock()) {
                    heard.add("second " + other.isHeld());
                } catch (InterruptedException never) {
                    heard.add(never.toString());
                }
            });
            Outside.deleteKeys(name);
            List<String> all = new ArrayList<>(List.of(heard.poll(30, TimeUnit.SECONDS), heard.poll(30, TimeUnit.SECONDS)));
            all.sort(null);
            assertEquals(List.of("first LOST", "second true"), all);
            assertFalse(hold.isHeld());
            assertEquals("its key was deleted from outside", hold.getLoss());
            assertThrows(LockLostException.class, hold::check);
            assertThrows(LockLostException.class, () -> hold.put(name + ".state", "late"));
            hold.onLost(error -> heard.add("late " + error.getMessage().contains("deleted")));
            assertEquals("late true", heard.poll(30, TimeUnit.SECONDS));

            LockLostException lost = assertThrows(LockLostException.class, hold::close);
            assertTrue(lost.getMessage().contains(name));
            assertTrue(heard.isEmpty());
        }
    }

    @Test
    void a_listener_of_a_released_hold_hears_nothing() throws Exception {
        try (Session session = Session.connect(ETCD)) {
            Hold released = session.mutex(freshName()).lock();
            BlockingQueue<String> heard = new LinkedBlockingQueue<>();
            released.onLost(error -> heard.add("released"));
            released.unlock();
            Hold held = session.mutex(freshName()).lock();
            held.onLost(error -> heard.add("held"));
            Outside.revoke(session.getLeaseId());
            assertEquals("held", heard.poll(30, TimeUnit.SECONDS));
            assertThrows(LockLostException.class, held::unlock);
            assertTrue(heard.isEmpty());
            // The session goes on with a new lease.
            session.mutex(held.getName()).lock().unlock();
            assertEquals(1, session.stats().getLeasesLost());
        }
    }

    @Test
    void the_error_of_a_body_wins_over_the_loss() throws Exception {
        try (Session session = Session.connect(ETCD)) {
            String name = freshName();
            IllegalStateException error = assertThrows(IllegalStateException.class, () -> {
                try (Hold hold = session.mutex(name).lock()) {
                    Outside.deleteKeys(name);
                    until(() -> !hold.isHeld());
                    throw new IllegalStateException("mine");
                }
            });
            assertInstanceOf(LockLostException.class, error.getSuppressed()[0]);
        }
    }

    @ParameterizedTest
    @MethodSource(TARGETS)
    void futures_lock_and_their_cancellation_leaves_nothing(String target) throws Exception {
        try (Session session = Session.connectAsync(target).get()) {
            String name = freshName();
            Mutex mutex = session.mutex(name);
            Hold hold = mutex.lockAsync().get();
            assertNull(session.mutex(name).tryLockAsync().get());
            CompletableFuture<Hold> cancelled = mutex.lockAsync();
            CompletableFuture<Hold> tooLate = mutex.lockAsync().orTimeout(20, TimeUnit.MILLISECONDS);
            CompletableFuture<Hold> timedOut = mutex.lockAsync(Duration.ofMillis(20));
            // A continuation may block: it does not run on a thread that others need.
            CompletableFuture<String> next = mutex.lockAsync().thenApply(held -> {
                try (held) {
                    return "inspected " + session.inspect(name).get(0).isHolder();
                } catch (InterruptedException error) {
                    throw new CompletionException(error);
                }
            });
            assertTrue(cancelled.cancel(false));
            assertThrows(CancellationException.class, cancelled::get);
            assertInstanceOf(TimeoutException.class, assertThrows(ExecutionException.class, tooLate::get).getCause());
            assertInstanceOf(LockTimeoutException.class, assertThrows(ExecutionException.class, timedOut::get).getCause());
            hold.unlockAsync().get();
            assertEquals("inspected true", next.get(30, TimeUnit.SECONDS));
            nothingIsLeft(target, session, name);
            session.closeAsync(Duration.ofSeconds(5)).get();
            assertThrows(ClosedException.class, () -> session.mutex(name));
        }
    }

    @ParameterizedTest
    @MethodSource(TARGETS)
    void futures_that_are_cancelled_at_the_moment_of_the_grant_leave_nothing(String target) throws Exception {
        try (Session session = Session.connect(target)) {
            Mutex mutex = session.mutex(freshName());
            for (int round = 0; round < 200; round++) {
                CompletableFuture<Hold> lock = mutex.lockAsync();
                long until = System.nanoTime() + ThreadLocalRandom.current().nextInt(isEtcd(target) ? 2_000_000 : 300_000);
                while (System.nanoTime() < until) Thread.onSpinWait();
                if (!lock.cancel(true)) lock.get().unlock();
            }
            mutex.lock(Duration.ofSeconds(30)).unlock();
            nothingIsLeft(target, session, mutex.getName());
        }
    }

    @Test
    void a_thousand_futures_wait_without_a_thread_of_their_own_and_are_served_in_order() throws Exception {
        try (Session session = Session.connect("memory:thousand")) {
            Mutex mutex = session.mutex("/thousand");
            Hold first = mutex.lock();
            int threads = Thread.activeCount();
            List<Integer> order = new ArrayList<>();
            List<CompletableFuture<?>> all = new ArrayList<>();
            for (int n = 0; n < 1000; n++) {
                int number = n;
                all.add(mutex.lockAsync().thenAccept(hold -> {
                    order.add(number);
                    hold.unlock();
                }));
            }
            assertTrue(Thread.activeCount() <= threads + 2);
            first.unlock();
            CompletableFuture.allOf(all.toArray(CompletableFuture[]::new)).get(60, TimeUnit.SECONDS);
            for (int n = 0; n < 1000; n++) assertEquals(n, order.get(n));
        }
    }

    @ParameterizedTest
    @MethodSource(TARGETS)
    void the_lock_of_the_jdk_works_with_it(String target) throws Exception {
        try (Session session = Session.connect(target)) {
            Mutex mutex = session.mutex(freshName());
            Lock lock = mutex.asLock();
            assertThrows(IllegalMonitorStateException.class, lock::unlock);
            mutex.asLock().lock();
            assertTrue(mutex.isHeld());
            mutex.asLock().unlock();
            lock.lock();
            assertTrue(mutex.isHeld());
            Worker other = new Worker(() -> {
                assertFalse(lock.tryLock());
                assertFalse(lock.tryLock(10, TimeUnit.MILLISECONDS));
                assertThrows(IllegalMonitorStateException.class, lock::unlock);
                lock.lockInterruptibly();
            });
            until(() -> other.getState() == Thread.State.WAITING && session.stats().getLocks() == 2);
            other.interrupt();
            Throwable error = other.end();
            assertTrue(error == null || error instanceof InterruptedException, String.valueOf(error));
            lock.unlock();
            assertTrue(lock.tryLock(30, TimeUnit.SECONDS));
            lock.unlock();
            assertTrue(lock.tryLock());
            lock.unlock();
            assertThrows(UnsupportedOperationException.class, lock::newCondition);
            // lock() keeps an interrupt for later.
            Thread.currentThread().interrupt();
            lock.lock();
            assertTrue(Thread.interrupted());
            lock.unlock();
            nothingIsLeft(target, session, mutex.getName());
        }
    }

    @ParameterizedTest
    @MethodSource(TARGETS)
    void closing_a_session_releases_its_holds_and_ends_its_waits(String target) throws Exception {
        String name = freshName();
        Session session = Session.connect(target);
        Session watching = Session.connect(target);
        Hold hold = session.mutex(name).lock();
        Worker waiter = new Worker(() -> session.mutex(name).lock());
        untilParked(waiter);
        session.close();
        session.close();
        assertInstanceOf(ClosedException.class, waiter.end());
        assertFalse(hold.isHeld());
        assertThrows(LockLostException.class, hold::unlock);
        assertThrows(ClosedException.class, () -> session.mutex(name));
        nothingIsLeft(target, watching, name);
        watching.close();
    }

    @Test
    void every_kind_of_error_has_its_exception() {
        for (String kind : io.github.etcdlock.uniffi.Etcdlock_nativeKt.errorKinds()) {
            EtcdLockException error = ErrorsKt.exception(kind, "text");
            assertEquals(kind, error.getKind());
            assertEquals("text", error.getMessage());
        }
    }

    @Test
    void wrong_arguments_are_named_at_once() throws Exception {
        assertTrue(assertThrows(InvalidException.class, () -> Session.connect("redis://a")).getMessage().contains("redis"));
        assertThrows(InvalidException.class, () -> Session.connect(List.of()));
        // Half of a surrogate pair: on the way it would become "?", and two keys one.
        assertThrows(InvalidException.class, () -> Session.connect("memory:\ud800"));
        assertThrows(InvalidException.class, () -> new Options().namespace("\ud800"));
        String secret = assertThrows(InvalidException.class, () -> new Options().password("secret\ud800")).getMessage();
        assertFalse(secret.contains("secret"), secret);
        try (Session session = Session.connect("memory:"); Hold hold = session.mutex("surrogates").lock()) {
            assertThrows(InvalidException.class, () -> session.mutex("\ud800"));
            assertThrows(InvalidException.class, () -> session.inspect("\udbff"));
            for (String half : List.of("\ud800", "a\udc00")) {
                assertThrows(InvalidException.class, () -> hold.put(half, "one"));
                assertThrows(InvalidException.class, () -> hold.put("k", half));
                assertThrows(InvalidException.class, () -> hold.get(half));
                assertThrows(InvalidException.class, () -> hold.delete(half));
            }
            hold.put("\ud83d\ude00", "a whole pair");
        }
        assertThrows(InvalidException.class, () -> Session.connect("memory:", new Options().ttl(Duration.ofSeconds(1))));
        assertThrows(InvalidException.class, () -> Session.connect("memory:", new Options().ttl(Duration.ofSeconds(-1))));
        assertThrows(InvalidException.class, () -> Session.connect("memory:", new Options().user("a")));
        assertThrows(InvalidException.class, () -> Session.connect("memory:", new Options().cert("a")));
        try (Session session = Session.connect("memory:")) {
            for (String name : List.of("", "a\0", "x".repeat(1025))) assertThrows(InvalidException.class, () -> session.mutex(name));
        }
    }

    @Test
    void a_target_that_is_not_there_is_unavailable_with_its_name() {
        Options soon = new Options().connectTimeout(Duration.ofMillis(200));
        UnavailableException error = assertThrows(UnavailableException.class, () -> Session.connect("127.0.0.1:1", soon));
        assertTrue(error.getMessage().contains("127.0.0.1:1"), error.getMessage());
    }

    @Test
    void namespaces_and_max_hold_are_passed_on() throws Exception {
        Options options = new Options().namespace("/ns").maxHold(Duration.ofMillis(100));
        try (Session session = Session.connect("memory:options", options)) {
            Hold hold = session.mutex("/a").lock();
            assertEquals("/ns/a", hold.getName());
            until(() -> !hold.isHeld());
            assertEquals("it was kept longer than max_hold", hold.getLoss());
        }
    }

    @Test
    void the_version_is_the_crates() {
        assertEquals(System.getProperty("etcdlock.project.version"), Session.getVersion());
    }

    @ParameterizedTest
    @MethodSource(TARGETS)
    void a_forgotten_hold_is_released_with_one_warning(String target) throws Exception {
        BlockingQueue<LogRecord> records = new LinkedBlockingQueue<>();
        Handler handler = new Handler() {
            @Override
            public void publish(LogRecord record) {
                if (record.getMessage().contains("garbage")) records.add(record);
            }

            @Override
            public void flush() {}

            @Override
            public void close() {}
        };
        Logger logger = Logger.getLogger("etcdlock");
        logger.addHandler(handler);
        logger.setUseParentHandlers(false);
        try (Session session = Session.connect(target)) {
            String name = freshName();
            AtomicReference<Object> heard = new AtomicReference<>();
            Worker forgetful = new Worker(() -> {
                Hold hold = session.mutex(name).lock();
                hold.onLost(error -> heard.set(hold));
            });
            assertNull(forgetful.end());
            until(() -> {
                System.gc();
                Hold next = session.mutex(name).tryLock();
                if (next != null) next.unlock();
                return next != null;
            });
            LogRecord record = records.poll(30, TimeUnit.SECONDS);
            assertNotNull(record);
            assertEquals("WARNING", record.getLevel().getName());
            assertTrue(record.getMessage().contains(name), record.getMessage());
            assertTrue(records.isEmpty());
            assertNull(heard.get());

            Mutex kept = session.mutex(freshName());
            kept.lock();
            for (int n = 0; n < 10; n++) System.gc();
            assertTrue(kept.isHeld(), "its mutex keeps it");
            kept.unlock();
        } finally {
            logger.removeHandler(handler);
            logger.setUseParentHandlers(true);
        }
    }

    @Test
    void many_rounds_leave_no_thread_and_no_descriptor() throws Exception {
        java.nio.file.Path descriptors = java.nio.file.Path.of("/proc/self/fd");
        java.nio.file.Path tasks = java.nio.file.Path.of("/proc/self/task");
        try (Session warm = Session.connect(ETCD)) {
            long[] before = {count(descriptors), count(tasks)};
            for (int n = 0; n < 30; n++) {
                try (Session session = Session.connect(ETCD)) {
                    String name = freshName();
                    session.mutex(name).lock();
                    assertThrows(LockTimeoutException.class, () -> session.mutex(name).lock(Duration.ofMillis(5)));
                    session.mutex(name).lockAsync();
                }
            }
            assertNotNull(warm);
            until(() -> count(descriptors) <= before[0] + 3 && count(tasks) <= before[1] + 8);
        }
    }

    private static long count(java.nio.file.Path folder) throws java.io.IOException {
        try (var entries = java.nio.file.Files.list(folder)) {
            return entries.count();
        }
    }
}
