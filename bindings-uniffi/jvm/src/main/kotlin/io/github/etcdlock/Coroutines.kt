@file:JvmName("Coroutines")

package io.github.etcdlock

import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.NonCancellable
import kotlinx.coroutines.coroutineScope
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.isActive
import kotlinx.coroutines.job
import kotlinx.coroutines.suspendCancellableCoroutine
import kotlinx.coroutines.withContext
import java.time.Duration
import java.util.function.Consumer
import kotlin.coroutines.resumeWithException

// The suspending forms of what blocks. Cancelling a coroutine ends its call and leaves nothing behind: also when the lock
// is granted at the same moment. They need kotlinx-coroutines, which whoever uses them has.

private suspend fun <T> await(started: Started<T>): T = suspendCancellableCoroutine { waiting ->
    started.onDone { result ->
        result.fold(
            { value -> waiting.resume(value) { _, value, _ -> started.giveBack(value) } },
            { error -> waiting.resumeWithException(error) },
        )
    }
    // Not before: it can come at once, and ends the call.
    waiting.invokeOnCancellation { started.cancel() }
}

/** [Session.connect], suspending. */
public suspend fun Session.Companion.awaitConnect(target: String = "", options: Options = Options()): Session =
    await(start(listOf(target), options))

/** [Session.inspect], suspending. */
public suspend fun Session.awaitInspect(name: String): List<Contender> = await(startInspect(name))

/** [Session.close], suspending. */
public suspend fun Session.awaitClose(timeout: Duration = Duration.ofSeconds(5)): Unit = await(startClose(timeout))

/** [Mutex.lock], suspending. No timeout: for ever. */
public suspend fun Mutex.awaitLock(timeout: Duration? = null): Hold = await(startLock(timeout))

/** [Mutex.tryLock], suspending. */
public suspend fun Mutex.awaitTryLock(): Hold? = await(startTryLock())

/** [Mutex.unlock], suspending. Cancelling it only ends the wait for the confirmation. */
public suspend fun Mutex.awaitUnlock(): Unit = await(startUnlock())

/** [Hold.unlock], suspending. Cancelling it only ends the wait for the confirmation. */
public suspend fun Hold.awaitUnlock(): Unit = await(startUnlock())

/** [Hold.put], suspending. */
public suspend fun Hold.awaitPut(key: ByteArray, value: ByteArray): Unit = await(startPut(key, value))

/** [Hold.put] of text, suspending. */
public suspend fun Hold.awaitPut(key: String, value: String): Unit =
    awaitPut(bytesOf("the key", key), bytesOf("the value", value))

/** [Hold.get], suspending. */
public suspend fun Hold.awaitGet(key: ByteArray): ByteArray? = await(startGet(key))

/** [Hold.get] of text, suspending. */
public suspend fun Hold.awaitGet(key: String): String? = awaitGet(bytesOf("the key", key))?.decodeToString()

/** [Hold.delete], suspending. */
public suspend fun Hold.awaitDelete(key: ByteArray): Unit = await(startDelete(key))

/**
 * Locks, runs `body`, and unlocks, whatever happens. Losing the hold cancels the body, and then this throws
 * [LockLostException]. Another error of the body's wins over one of the release.
 */
public suspend fun <T> Mutex.withLock(timeout: Duration? = null, body: suspend CoroutineScope.(Hold) -> T): T {
    val hold = awaitLock(timeout)
    var lost: LockLostException? = null
    val result = try {
        coroutineScope {
            val job = coroutineContext.job
            val listener = Consumer<LockLostException> {
                lost = it
                job.cancel(CancellationException(it.message, it))
            }
            hold.onLost(listener)
            try {
                body(hold)
            } finally {
                hold.removeListener(listener)
            }
        }
    } catch (error: Throwable) {
        val isOurs = error is CancellationException && currentCoroutineContext().isActive
        withContext(NonCancellable) { runCatching { if (!hold.isReleased) hold.awaitUnlock() } }
        throw if (isOurs) lost ?: error else error
    }
    withContext(NonCancellable) { if (!hold.isReleased) hold.awaitUnlock() }
    return result
}
