package io.github.etcdlock

import com.sun.jna.CallbackThreadInitializer
import com.sun.jna.Native
import io.github.etcdlock.uniffi.Call
import io.github.etcdlock.uniffi.DoneListener
import io.github.etcdlock.uniffi.Event
import io.github.etcdlock.uniffi.Outcome
import io.github.etcdlock.uniffi.checkMayBlock
import io.github.etcdlock.uniffi.openInbox
import io.github.etcdlock.uniffi.setLogLevel
import io.github.etcdlock.uniffi.shutdown
import io.github.etcdlock.uniffi.uniffiCallbackInterfaceDoneListener
import io.github.etcdlock.uniffi.waitForEvents
import java.lang.ref.ReferenceQueue
import java.lang.ref.WeakReference
import java.time.Duration
import java.util.concurrent.CompletableFuture
import java.util.concurrent.ConcurrentHashMap
import java.util.concurrent.CountDownLatch
import java.util.concurrent.Executors
import java.util.concurrent.atomic.AtomicLong

/**
 * A call that has been started, and the ways to wait for it. Its result stays on the native side until it is taken, so
 * whoever gives up before that has nothing to give back.
 *
 * @param giveBack releases a result that came, but that nobody will get
 */
internal class Started<T>(
    private val call: Call,
    private val giveBack: (T) -> Unit = {},
    private val convert: (Outcome) -> T,
) {
    private fun take(): T = convert(native { call.result() })

    /** Parks this thread. Interrupting it ends the wait, and the call is undone in the background. */
    fun await(): T = call.use {
        val done = CountDownLatch(1)
        if (!call.onDone(Done(done::countDown))) done.await()
        take()
    }

    /** For what has taken effect already: an interrupt is kept for later. */
    fun awaitUninterruptibly(): T = call.use {
        val done = CountDownLatch(1)
        var interrupted = false
        if (!call.onDone(Done(done::countDown))) {
            while (done.count > 0) {
                try {
                    done.await()
                } catch (_: InterruptedException) {
                    interrupted = true
                }
            }
        }
        try {
            take()
        } finally {
            if (interrupted) Thread.currentThread().interrupt()
        }
    }

    /** Completed by a thread of this library. Whatever else completes it, such as `cancel()`, ends the call. */
    fun future(): CompletableFuture<T> {
        val future = CompletableFuture<T>()
        future.whenComplete { _, _ -> call.close() }
        val settle = {
            Library.callbacks.execute {
                if (!future.isDone) {
                    try {
                        val result = take()
                        if (!future.complete(result)) giveBack(result)
                    } catch (error: Throwable) {
                        future.completeExceptionally(error)
                    }
                }
            }
        }
        if (call.onDone(Done(settle))) settle()
        return future
    }

    /** Calls `settle` with the result when it is there, on the library's notify thread. It must be quick. */
    fun onDone(settle: (Result<T>) -> Unit) {
        val done = { settle(runCatching { call.use { take() } }) }
        if (call.onDone(Done(done))) done()
    }

    fun cancel() = call.close()

    fun giveBack(result: T) = giveBack.invoke(result)
}

private class Done(private val run: () -> Unit) : DoneListener {
    override fun done() = run()
}

/** Refuses what could never return, before anything has been started, and what was interrupted before. */
internal fun <T> blocking(start: () -> Started<T>): T {
    refuseToBlockItself()
    if (Thread.interrupted()) throw InterruptedException()
    return start().await()
}

internal fun <T> blockingUninterruptibly(start: () -> Started<T>): T {
    refuseToBlockItself()
    return start().awaitUninterruptibly()
}

private fun refuseToBlockItself() {
    if (Quick.etcdlock_uniffi_may_block() == 0.toByte()) native { checkMayBlock() }
}

/** What UniFFI's way of calling would make slow: see `quick.rs`. */
internal object Quick {
    init {
        Native.register(Quick::class.java, "etcdlock_uniffi")
    }

    external fun etcdlock_uniffi_is_held(hold: Long): Byte

    external fun etcdlock_uniffi_may_block(): Byte
}

internal fun Duration.inSeconds(): Double = seconds + nano / 1e9

internal fun durationOf(seconds: Double): Duration = Duration.ofNanos((seconds * 1e9).toLong())

/** What belongs to the process: its inbox, its threads, and its end. */
internal object Library {
    /** Runs users' code, which may block or be slow. */
    val callbacks = Executors.newCachedThreadPool { work -> daemon("etcdlock-callback", work) }

    private val logger = System.getLogger("etcdlock")
    private val numbers = AtomicLong()
    private val watched = ConcurrentHashMap<Long, Watched>()
    private val collected = ReferenceQueue<Hold>()

    private class Watched(val number: Long, hold: Hold, queue: ReferenceQueue<Hold>) : WeakReference<Hold>(hold, queue)

    init {
        // The notify thread becomes a thread of the JVM once, not at each call.
        val stayAttached = CallbackThreadInitializer(true, false, "etcdlock-notify")
        Native.setCallbackThreadInitializer(uniffiCallbackInterfaceDoneListener.done, stayAttached)
        Native.setCallbackThreadInitializer(uniffiCallbackInterfaceDoneListener.uniffiFree, stayAttached)
        native { openInbox() }
        val level = when {
            logger.isLoggable(System.Logger.Level.DEBUG) -> 4
            logger.isLoggable(System.Logger.Level.INFO) -> 3
            else -> 2
        }
        native { setLogLevel(level.toUByte()) }
        daemon("etcdlock-events") { while (true) waitForEvents().forEach(::handOn) }.start()
        if (System.getProperty("etcdlock.closeAtExit") != "false") {
            Runtime.getRuntime().addShutdownHook(Thread(::finish, "etcdlock-exit"))
        }
    }

    /** Begins with the first session. */
    fun start() = Unit

    /** What is lost at the end of the JVM is nobody's loss any more. */
    private fun finish() {
        setLogLevel(0u)
        shutdown(1.0)
    }

    private fun daemon(name: String, work: Runnable) = Thread(work, name).apply { isDaemon = true }

    private fun handOn(event: Event) {
        when (event) {
            is Event.Lost -> watched.remove(event.id.toLong())?.get()?.hearOfLoss(event.text)
            is Event.Line -> logger.log(
                when (event.level.toInt()) {
                    1 -> System.Logger.Level.ERROR
                    2 -> System.Logger.Level.WARNING
                    3 -> System.Logger.Level.INFO
                    4 -> System.Logger.Level.DEBUG
                    else -> System.Logger.Level.TRACE
                },
                event.text,
            )
        }
    }

    /** A number under which the loss of a hold is reported. The hold can still become garbage. */
    fun watch(hold: Hold): Long {
        while (true) watched.remove((collected.poll() as Watched? ?: break).number)
        val number = numbers.incrementAndGet()
        watched[number] = Watched(number, hold, collected)
        return number
    }

    fun forget(number: Long) {
        watched.remove(number)
    }
}
