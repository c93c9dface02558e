// Adds to a number in a file, together with any other programs, one at a time.
//
//     java -cp … CounterKt TARGET FILE ROUNDS lock|nolock

import io.github.etcdlock.Options
import io.github.etcdlock.Session
import io.github.etcdlock.awaitConnect
import io.github.etcdlock.withLock
import java.nio.file.Files
import java.nio.file.Path
import java.nio.file.StandardOpenOption
import java.time.Duration
import kotlin.system.exitProcess
import kotlin.time.Duration.Companion.microseconds
import kotlin.time.TimeSource
import kotlinx.coroutines.delay
import kotlinx.coroutines.runBlocking

private suspend fun addOne(file: Path): Long {
    val value = (Files.readString(file).trim().toLongOrNull() ?: 0) + 1
    delay(200.microseconds) // somebody else may come between
    // In place and always ten digits: one step, so that a reader never finds half a number.
    Files.writeString(file, "%010d".format(value), StandardOpenOption.WRITE)
    return value
}

fun main(args: Array<String>) = runBlocking {
    if (args.size != 4) {
        System.err.println("usage: counter TARGET FILE ROUNDS lock|nolock")
        exitProcess(64)
    }
    val (target, path, rounds, how) = args
    val file = Path.of(path)
    Session.awaitConnect(target, Options().ttl(Duration.ofSeconds(10))).use { session ->
        val mutex = session.mutex("/demo/counter")
        repeat(rounds.toInt()) {
            if (how == "nolock") {
                println("token=- value=${addOne(file)} waited_us=0")
            } else {
                val start = TimeSource.Monotonic.markNow()
                mutex.withLock { hold ->
                    val waited = start.elapsedNow().inWholeMicroseconds
                    println("token=${hold.token} value=${addOne(file)} waited_us=$waited")
                }
            }
        }
    }
}
