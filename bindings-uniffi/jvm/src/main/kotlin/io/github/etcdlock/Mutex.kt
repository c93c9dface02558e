package io.github.etcdlock

import io.github.etcdlock.uniffi.NativeMutex
import io.github.etcdlock.uniffi.Outcome
import java.time.Duration
import java.util.concurrent.CompletableFuture
import java.util.concurrent.TimeUnit
import java.util.concurrent.locks.Condition
import java.util.concurrent.locks.Lock

/**
 * One lock name, seen by one session. Not re-entrant. Share it between threads or not: each `lock()` waits its turn.
 *
 * ```java
 * try (Hold hold = mutex.lock(Duration.ofSeconds(5))) { … }
 * ```
 */
public class Mutex internal constructor(private val native: NativeMutex) {
    /** The latest hold, for those who say `mutex.unlock()` and keep no hold themselves. */
    @Volatile
    private var latest: Hold? = null

    /** The name, with the session's namespace. */
    public val name: String = native.name()

    /**
     * Waits its turn, through outages and re-elections, until the lock is held. Interrupting the thread ends the wait
     * and leaves nothing behind.
     *
     * @throws UnavailableException if etcd refuses for a reason that waiting does not mend
     * @throws DeniedException
     * @throws ClosedException
     */
    @Throws(InterruptedException::class)
    public fun lock(): Hold = blocking { startLock(null) }

    /**
     * [lock], for at most `timeout`; zero is one try.
     *
     * @throws LockTimeoutException after it, with nothing left behind
     */
    @Throws(InterruptedException::class)
    public fun lock(timeout: Duration): Hold = blocking { startLock(timeout) }

    /**
     * Takes the lock if it is free; null if somebody holds it. Never waits for other holders; a failed try writes nothing.
     *
     * @throws UnavailableException without an answer within 5 s
     */
    @Throws(InterruptedException::class)
    public fun tryLock(): Hold? = blocking { startTryLock() }

    /**
     * Releases the hold that was acquired last through this mutex. Blocks until etcd has confirmed it, at most 5 s;
     * interrupting it changes nothing.
     *
     * @throws NotHeldException if there is none
     * @throws LockLostException if the hold was lost before
     * @throws UnavailableException without a confirmation: released here, and the key goes on being deleted
     */
    public fun unlock(): Unit = blockingUninterruptibly { startUnlock() }

    /** [lock] without waiting. Cancelling the future gives the place in the queue up and leaves nothing behind. */
    public fun lockAsync(): CompletableFuture<Hold> = startLock(null).future()

    /** [lock] without waiting. The future fails with [LockTimeoutException] after `timeout`. */
    public fun lockAsync(timeout: Duration): CompletableFuture<Hold> = startLock(timeout).future()

    /** [tryLock] without waiting; null if somebody holds the lock. */
    public fun tryLockAsync(): CompletableFuture<Hold?> = startTryLock().future()

    /** [unlock] without waiting. Cancelling the future only ends the wait for the confirmation. */
    public fun unlockAsync(): CompletableFuture<Void?> = startUnlock().future().thenApply { null }

    /** Whether this mutex holds the lock, as far as can be known here. Local; false from the deadline on. */
    public fun isHeld(): Boolean = latest?.isHeld() ?: false

    /** How long its hold is good for without another renewal; zero if it holds nothing. Local. */
    public fun remaining(): Duration = latest?.remaining() ?: Duration.ZERO

    /** The fencing token of its hold, even after its loss until it is unlocked; null if there is none. */
    public val token: Long? get() = latest?.takeUnless { it.isReleased }?.token

    /** This mutex as the JDK's interface: for code that takes a [Lock]. */
    public fun asLock(): Lock = lock

    /** One, because it knows which thread holds what. */
    private val lock by lazy { MutexLock(this) }

    internal fun startLock(timeout: Duration?): Started<Hold> =
        Started(native { native.lock(timeout?.inSeconds()) }, Hold::release) { held(it as Outcome.Hold) }

    internal fun startTryLock(): Started<Hold?> =
        Started(native.tryLock(), { it?.release() }) { outcome -> (outcome as? Outcome.Hold)?.let(::held) }

    internal fun startUnlock(): Started<Unit> =
        latest?.takeUnless { it.isReleased }?.startUnlock() ?: Started(native.unlock()) { }

    private fun held(outcome: Outcome.Hold): Hold =
        outcome.run { Hold(hold, address.toLong(), token, name) }.also { latest = it }

    override fun toString(): String = "Mutex($name${if (isHeld()) ", held" else ""})"
}

/** Each thread releases its own hold: after a loss another thread may have the mutex's latest. */
private class MutexLock(private val mutex: Mutex) : Lock {
    private val held = ThreadLocal<Hold>()

    override fun lock() = held.set(blockingUninterruptibly { mutex.startLock(null) })

    override fun lockInterruptibly() = held.set(mutex.lock())

    override fun tryLock(): Boolean = keep(blockingUninterruptibly { mutex.startTryLock() })

    override fun tryLock(time: Long, unit: TimeUnit): Boolean = try {
        keep(mutex.lock(Duration.ofNanos(unit.toNanos(time.coerceAtLeast(0)))))
    } catch (_: LockTimeoutException) {
        false
    }

    private fun keep(hold: Hold?): Boolean {
        if (hold != null) held.set(hold)
        return hold != null
    }

    override fun unlock() {
        val hold = held.get() ?: throw IllegalMonitorStateException("this thread does not hold the lock ${mutex.name}")
        held.remove()
        hold.unlock()
    }

    override fun newCondition(): Condition = throw UnsupportedOperationException("a distributed lock has no conditions")

    override fun toString(): String = "$mutex as Lock"
}
