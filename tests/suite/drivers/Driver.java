// The suite's driver for the JVM: futures for locks, threads for all else. See ../README.md.

import io.github.etcdlock.*;
import java.io.*;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.*;
import java.util.concurrent.*;
import java.util.regex.*;
import java.util.stream.Collectors;

final class Driver {
    private static final Pattern MEMBER = Pattern.compile("\"(\\w+)\":\\s*(?:\"([^\"]*)\"|(-?\\d+))");
    // Java has no CLOCK_BOOTTIME; the runner says how far it is from CLOCK_MONOTONIC.
    private static final long OFFSET = Long.parseLong(System.getenv().getOrDefault("DRIVER_BOOTTIME_OFFSET", "0"));
    private static final PrintStream OUT = new PrintStream(new FileOutputStream(FileDescriptor.out), true, StandardCharsets.UTF_8);
    private static final Map<String, Session> SESSIONS = new ConcurrentHashMap<>();
    private static final Map<String, Mutex> MUTEXES = new ConcurrentHashMap<>();
    private static final Map<String, Hold> HOLDS = new ConcurrentHashMap<>();
    private static final Map<String, CompletableFuture<Hold>> LOCKS = new ConcurrentHashMap<>();

    private static long now() {
        return System.nanoTime() + OFFSET;
    }

    private static Duration ms(Map<String, String> r, String name) {
        return r.containsKey(name) ? Duration.ofMillis(Long.parseLong(r.get(name))) : null;
    }

    private static String text(String text) {
        return text == null ? "null" : '"' + text.replace("\\", "\\\\").replace("\"", "\\\"").replace("\n", "\\n") + '"';
    }

    private static void say(String line) {
        synchronized (OUT) {
            OUT.print("{" + line + "}\n");
            OUT.flush();
        }
    }

    private static String state(Mutex mutex) {
        long seen = now();
        Long token = mutex.getToken();
        return "\"held\":" + mutex.isHeld() + ",\"remaining\":" + mutex.remaining().toMillis() + ",\"token\":" + (token == null ? 0 : token) + ",\"seen\":" + seen;
    }

    private static String granted(String name, Hold hold) {
        if (hold == null) return "\"kind\":\"BUSY\",\"message\":\"\"";
        HOLDS.put(name, hold);
        hold.onLost(error -> say("\"event\":\"lost\",\"mutex\":" + text(name) + ",\"token\":" + hold.getToken() + ",\"reason\":" + text(error.getMessage()) + ",\"at\":" + now()));
        return state(MUTEXES.get(name));
    }

    private static String connect(Map<String, String> r) throws InterruptedException {
        Options options = new Options();
        if (r.containsKey("ttl")) options.ttl(ms(r, "ttl"));
        if (r.containsKey("connect_timeout")) options.connectTimeout(ms(r, "connect_timeout"));
        if (r.containsKey("max_hold")) options.maxHold(ms(r, "max_hold"));
        if (r.containsKey("namespace")) options.namespace(r.get("namespace"));
        if (r.containsKey("owner")) options.owner(r.get("owner"));
        if (r.containsKey("user")) options.user(r.get("user"));
        if (r.containsKey("password")) options.password(r.get("password"));
        Session session = Session.connect(r.getOrDefault("target", ""), options);
        SESSIONS.put(r.get("session"), session);
        Long lease = session.getLeaseId();
        return "\"ttl\":" + session.getTtl().toMillis() + ",\"lease\":\"" + (lease == null ? 0 : lease) + '"';
    }

    private static String shown(Contender c) {
        return "{\"holder\":" + c.isHolder() + ",\"owner\":" + text(c.getOwner()) + ",\"host\":" + text(c.getHost()) + ",\"pid\":" + c.getPid()
                + ",\"language\":" + text(c.getLanguage()) + ",\"token\":" + c.getToken() + ",\"age\":" + (c.getAge() == null ? -1 : c.getAge().toMillis()) + ",\"key\":" + text(c.getKey()) + "}";
    }

    private static String done(Runnable call) {
        call.run();
        return "";
    }

    private static String call(Map<String, String> r) throws Exception {
        Mutex mutex = r.containsKey("mutex") ? MUTEXES.get(r.get("mutex")) : null;
        Hold hold = r.containsKey("mutex") ? HOLDS.get(r.get("mutex")) : null;
        Session session = r.containsKey("session") ? SESSIONS.get(r.get("session")) : null;
        switch (r.get("do")) {
            case "connect": return connect(r);
            case "mutex": return done(() -> MUTEXES.put(r.get("mutex"), session.mutex(r.get("name"))));
            case "lock": return granted(r.get("mutex"), LOCKS.get(r.get("id")).get());
            case "cancel": return done(() -> Optional.ofNullable(LOCKS.get(r.get("op"))).ifPresent(lock -> lock.cancel(true)));
            case "try_lock": return granted(r.get("mutex"), mutex.tryLock());
            case "unlock": return done(mutex::unlock);
            case "state": return state(mutex);
            case "check": return done(hold::check);
            case "put": hold.put(r.get("key"), r.get("value")); return "";
            case "get": return "\"value\":" + text(hold.get(r.get("key")));
            case "delete": hold.delete(r.get("key")); return "";
            case "inspect": return "\"contenders\":[" + session.inspect(r.get("name")).stream().map(Driver::shown).collect(Collectors.joining(",")) + "]";
            case "stats": {
                Stats s = session.stats();
                return String.format("\"locks\":%d,\"holds_lost\":%d,\"leases_lost\":%d,\"renewals\":%d,\"requests\":%d", s.getLocks(), s.getHoldsLost(), s.getLeasesLost(), s.getRenewals(), s.getRequests());
            }
            case "close": return done(() -> session.close(r.containsKey("timeout") ? ms(r, "timeout") : Duration.ofSeconds(5)));
            default: throw new IllegalArgumentException(r.toString());
        }
    }

    private static void serve(Map<String, String> r, long from) {
        String result;
        try {
            result = call(r);
        } catch (CancellationException cancelled) {
            result = "\"kind\":\"CANCELLED\",\"message\":\"\"";
        } catch (Exception thrown) {
            Throwable error = thrown instanceof ExecutionException ? thrown.getCause() : thrown;
            if (!(error instanceof EtcdLockException)) throw new IllegalStateException(error);
            result = "\"kind\":" + text(((EtcdLockException) error).getKind()) + ",\"message\":" + text(error.getMessage());
        }
        LOCKS.remove(r.get("id"));
        say("\"id\":" + r.get("id") + ",\"from\":" + from + ",\"at\":" + now() + (result.isEmpty() ? "" : "," + result));
    }

    public static void main(String[] args) throws IOException {
        // Its log goes to standard error, where failures are looked for.
        java.util.logging.Logger.getLogger("").setLevel(java.util.logging.Level.OFF);
        ExecutorService threads = Executors.newCachedThreadPool();
        say("\"driver\":\"jvm\",\"version\":" + text(Session.getVersion()) + ",\"lacks\":\"\"");
        var in = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8));
        for (String line = in.readLine(); line != null; line = in.readLine()) {
            long from = now();
            Map<String, String> request = new HashMap<>();
            Matcher members = MEMBER.matcher(line);
            while (members.find()) request.put(members.group(1), members.group(2) != null ? members.group(2) : members.group(3));
            // Started here, so that a later request can cancel it.
            if (request.get("do").equals("lock")) {
                Mutex mutex = MUTEXES.get(request.get("mutex"));
                LOCKS.put(request.get("id"), request.containsKey("timeout") ? mutex.lockAsync(ms(request, "timeout")) : mutex.lockAsync());
            }
            threads.execute(() -> serve(request, from));
        }
        Runtime.getRuntime().halt(0);
    }
}
