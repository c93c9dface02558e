package io.github.etcdlock;

import static org.junit.jupiter.api.Assertions.assertTrue;

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Base64;
import java.util.List;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.regex.Pattern;
import java.util.stream.Stream;

/** A look at etcd from outside, through its JSON gateway; and other processes. */
final class Outside {
    static final String ETCD = endpoint();
    private static final AtomicInteger NUMBERS = new AtomicInteger();
    private static final Pattern KEY = Pattern.compile("\"key\":\"([^\"]*)\"");

    interface Look {
        boolean isSo() throws Exception;
    }

    private static String endpoint() {
        String endpoint = System.getenv("ETCDLOCK_ENDPOINTS");
        if (endpoint == null) throw new IllegalStateException("$ETCDLOCK_ENDPOINTS is not set: run `make test`, which starts an etcd");
        return endpoint;
    }

    /** Where locks live: most tests run once for each. */
    static Stream<String> targets() {
        return Stream.of("memory:junit", ETCD);
    }

    /** A lock name that nothing else uses. */
    static String freshName() {
        return "/jvm/" + ProcessHandle.current().pid() + "/" + NUMBERS.incrementAndGet();
    }

    /** Waits until it is so; fails when that takes longer than a hang would. */
    static void until(Look look) throws Exception {
        long end = System.nanoTime() + TimeUnit.SECONDS.toNanos(60);
        while (!look.isSo()) {
            assertTrue(System.nanoTime() < end, "not seen within 60 s");
            Thread.sleep(5);
        }
    }

    private static String ask(String path, String body) throws IOException, InterruptedException {
        HttpRequest request = HttpRequest.newBuilder(URI.create("http://" + ETCD + "/v3/" + path))
                .POST(HttpRequest.BodyPublishers.ofString(body)).build();
        return HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofString()).body();
    }

    private static String range(String name) {
        Base64.Encoder encoder = Base64.getEncoder();
        String start = encoder.encodeToString((name + "/").getBytes(StandardCharsets.UTF_8));
        String end = encoder.encodeToString((name + "0").getBytes(StandardCharsets.UTF_8));
        return "{\"key\":\"" + start + "\",\"range_end\":\"" + end + "\"}";
    }

    static List<String> keys(String name) throws IOException, InterruptedException {
        List<String> keys = new ArrayList<>();
        var matcher = KEY.matcher(ask("kv/range", range(name)));
        while (matcher.find()) keys.add(new String(Base64.getDecoder().decode(matcher.group(1)), StandardCharsets.UTF_8));
        return keys;
    }

    static void deleteKeys(String name) throws IOException, InterruptedException {
        ask("kv/deleterange", range(name));
    }

    static void revoke(long lease) throws IOException, InterruptedException {
        ask("lease/revoke", "{\"ID\":\"" + lease + "\"}");
    }

    /** A main class of the tests or of the examples, in a process of its own. */
    static final class Program implements AutoCloseable {
        final Process process;
        private final BufferedReader out;

        Program(String main, String... args) throws IOException {
            this(System.getProperty("surefire.test.class.path", System.getProperty("java.class.path")), null, main, args);
        }

        Program(String classPath, Path folder, String main, String... args) throws IOException {
            List<String> command = new ArrayList<>();
            command.add(Path.of(System.getProperty("java.home"), "bin", "java").toString());
            command.addAll(List.of("-cp", classPath, main));
            command.addAll(List.of(args));
            process = new ProcessBuilder(command).directory(folder == null ? null : folder.toFile()).start();
            out = new BufferedReader(new InputStreamReader(process.getInputStream(), StandardCharsets.UTF_8));
        }

        String says() throws IOException {
            return out.readLine();
        }

        List<String> rest() throws IOException {
            List<String> lines = new ArrayList<>();
            for (String line = out.readLine(); line != null; line = out.readLine()) lines.add(line);
            return lines;
        }

        /** Its exit code and what it said on standard error. */
        String end() throws Exception {
            rest();
            String error = new String(process.getErrorStream().readAllBytes(), StandardCharsets.UTF_8);
            assertTrue(process.waitFor(60, TimeUnit.SECONDS), "it hangs");
            return process.exitValue() + " " + error;
        }

        @Override
        public void close() {
            process.destroyForcibly();
        }
    }

    private Outside() {}
}
