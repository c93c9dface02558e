package io.github.etcdlock

import io.github.etcdlock.uniffi.NativeHold
import io.github.etcdlock.uniffi.Outcome
import java.lang.ref.Reference
import java.time.Duration
import java.util.concurrent.CompletableFuture
import java.util.function.Consumer

/**
 * One successful acquisition, from lock to unlock or loss.
 *
 * Losing it does not stop your code: look at [isHeld], hear of it with [onLost], and let the resource refuse old
 * [token]s, or write through [put]. A hold that is forgotten is released by the garbage collector, with a warning to the
 * logger `etcdlock`.
 */
public class Hold internal constructor(
    private val native: NativeHold,
    private val address: Long,
    /** The fencing token: a number strictly larger than that of every earlier hold of this name. */
    public val token: Long,
    /** The name of the lock, with the session's namespace. */
    public val name: String,
) : AutoCloseable {
    private var number: Long? = null
    private val listeners = ArrayList<Consumer<in LockLostException>>()
    private var lost: LockLostException? = null

    @Volatile
    internal var isReleased: Boolean = false
        private set

    /** Whether the hold still owns the lock, as far as can be known here. Local; false from the deadline on. */
    public fun isHeld(): Boolean = try {
        Quick.etcdlock_uniffi_is_held(address) != 0.toByte()
    } finally {
        // The address is good until the native object is collected.
        Reference.reachabilityFence(native)
    }

    /** How long the hold is good for without another renewal; zero if it is lost or released. Local. */
    public fun remaining(): Duration = durationOf(native.remaining())

    /**
     * Returns if [isHeld]. Local.
     *
     * @throws LockLostException
     * @throws NotHeldException if it was released
     */
    public fun check(): Unit = native { native.check() }

    /** Why the hold was lost; null if it was not. */
    public val loss: String? get() = native.loss()

    /**
     * Calls the listener once, on a thread of this library, when the hold is lost: at once if it is lost already, never if
     * it is released first. It may block.
     */
    public fun onLost(listener: Consumer<in LockLostException>) {
        val known = synchronized(listeners) {
            if (lost == null) listeners.add(listener)
            if (number == null) number = Library.watch(this).also { native.reportLoss(it.toULong()) }
            lost
        }
        if (known != null) Library.callbacks.execute { listener.accept(known) }
    }

    internal fun hearOfLoss(text: String) {
        val error = LockLostException(text)
        val told = synchronized(listeners) {
            lost = error
            listeners.toList().also { listeners.clear() }
        }
        told.forEach { Library.callbacks.execute { it.accept(error) } }
    }

    /** A listener that has come too late to be of use. */
    internal fun removeListener(listener: Consumer<in LockLostException>) {
        synchronized(listeners) { listeners.remove(listener) }
    }

    /**
     * Releases the lock. Blocks until etcd has confirmed it, at most 5 s; interrupting it changes nothing.
     *
     * @throws NotHeldException if it was released before
     * @throws LockLostException if it was lost before
     * @throws UnavailableException without a confirmation: released here, and the key goes on being deleted
     */
    public fun unlock(): Unit = blockingUninterruptibly { startUnlock() }

    /** [unlock], for try-with-resources and `use`; does nothing if the hold was unlocked before. */
    override fun close() {
        if (!isReleased) unlock()
    }

    /** [unlock] without waiting. Cancelling the future only ends the wait for the confirmation. */
    public fun unlockAsync(): CompletableFuture<Void?> = startUnlock().future().thenApply { null }

    /**
     * Writes `key` only if this hold still owns the lock, atomically in etcd. The key is used as given, without the
     * namespace. Blocks for one request, at most 5 s.
     *
     * @throws LockLostException if nothing was written
     * @throws UnavailableException if it may or may not have been written
     */
    @Throws(InterruptedException::class)
    public fun put(key: ByteArray, value: ByteArray): Unit = blocking { startPut(key, value) }

    /** [put] of text. */
    @Throws(InterruptedException::class)
    public fun put(key: String, value: String): Unit = put(bytesOf("the key", key), bytesOf("the value", value))

    /** Reads `key` only if this hold still owns the lock; null if there is no such key. See [put]. */
    @Throws(InterruptedException::class)
    public fun get(key: ByteArray): ByteArray? = blocking { startGet(key) }

    /** [get] of text. */
    @Throws(InterruptedException::class)
    public fun get(key: String): String? = get(bytesOf("the key", key))?.let { String(it) }

    /** Deletes `key` only if this hold still owns the lock; deleting what is not there is fine. See [put]. */
    @Throws(InterruptedException::class)
    public fun delete(key: ByteArray): Unit = blocking { startDelete(key) }

    /** [delete] of a key that is text. */
    @Throws(InterruptedException::class)
    public fun delete(key: String): Unit = delete(bytesOf("the key", key))

    /** [put] without waiting. */
    public fun putAsync(key: ByteArray, value: ByteArray): CompletableFuture<Void?> = startPut(key, value).future().thenApply { null }

    /** [get] without waiting. */
    public fun getAsync(key: ByteArray): CompletableFuture<ByteArray?> = startGet(key).future()

    /** [delete] without waiting. */
    public fun deleteAsync(key: ByteArray): CompletableFuture<Void?> = startDelete(key).future().thenApply { null }

    internal fun startUnlock(): Started<Unit> {
        isReleased = true
        synchronized(listeners) {
            listeners.clear()
            number?.let(Library::forget)
        }
        return Started(native.unlock()) { }
    }

    /** Released in the background: for a hold that came too late. */
    internal fun release() {
        if (!isReleased) startUnlock().onDone { }
    }

    internal fun startPut(key: ByteArray, value: ByteArray) = Started(native.put(key, value)) { }

    internal fun startGet(key: ByteArray) = Started(native.get(key)) { (it as? Outcome.Bytes)?.bytes }

    internal fun startDelete(key: ByteArray) = Started(native.delete(key)) { }

    override fun toString(): String = "Hold($name, token $token, ${if (isHeld()) "held" else "not held"})"
}
