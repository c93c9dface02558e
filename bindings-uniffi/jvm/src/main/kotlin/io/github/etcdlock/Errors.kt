package io.github.etcdlock

import io.github.etcdlock.uniffi.Failure

/** Every exception of etcdlock. The message says what happened, to which name and target, and what to do. */
public sealed class EtcdLockException(
    message: String,
    /** The name of the kind, the same in every language, such as `TIMEOUT`. */
    public val kind: String,
) : RuntimeException(message)

/** The time given to `lock()` ran out before the lock was free. Nothing is left behind. */
public class LockTimeoutException internal constructor(message: String) : EtcdLockException(message, "TIMEOUT")

/** Somebody else holds the lock. On the JVM `tryLock()` returns null instead. */
public class LockBusyException internal constructor(message: String) : EtcdLockException(message, "BUSY")

/** The hold was lost before the call. Another holder may be at work, so stop. */
public class LockLostException internal constructor(message: String) : EtcdLockException(message, "LOST")

/** There is nothing to release. */
public class NotHeldException internal constructor(message: String) : EtcdLockException(message, "NOT_HELD")

/** The call was cancelled. */
public class CancelledException internal constructor(message: String) : EtcdLockException(message, "CANCELLED")

/** The target could not be reached in time. */
public class UnavailableException internal constructor(message: String) : EtcdLockException(message, "UNAVAILABLE")

/** The target refused the credentials or the permission. */
public class DeniedException internal constructor(message: String) : EtcdLockException(message, "DENIED")

/** An argument breaks a rule; the message names the value and the rule. */
public class InvalidException internal constructor(message: String) : EtcdLockException(message, "INVALID")

/** The session has been closed. */
public class ClosedException internal constructor(message: String) : EtcdLockException(message, "CLOSED")

/** The handle was made before `fork()` and belongs to the parent process. */
public class ForkedException internal constructor(message: String) : EtcdLockException(message, "FORKED")

/** A blocking call on a thread of the library's own could never return, so it is refused. */
public class DeadlockException internal constructor(message: String) : EtcdLockException(message, "DEADLOCK")

/** A defect in etcdlock. Please report it. */
public class InternalException internal constructor(message: String) : EtcdLockException(message, "INTERNAL")

internal fun exception(kind: String, text: String): EtcdLockException = when (kind) {
    "TIMEOUT" -> LockTimeoutException(text)
    "BUSY" -> LockBusyException(text)
    "LOST" -> LockLostException(text)
    "NOT_HELD" -> NotHeldException(text)
    "CANCELLED" -> CancelledException(text)
    "UNAVAILABLE" -> UnavailableException(text)
    "DENIED" -> DeniedException(text)
    "INVALID" -> InvalidException(text)
    "CLOSED" -> ClosedException(text)
    "FORKED" -> ForkedException(text)
    "DEADLOCK" -> DeadlockException(text)
    else -> InternalException(text)
}

/** Half of a surrogate pair has no UTF-8: it would become another text on the way, and two names one. */
internal fun wellFormed(what: String, text: String): String {
    if (!Charsets.UTF_8.newEncoder().canEncode(text)) {
        throw InvalidException("$what is not well-formed: it has half of a surrogate pair")
    }
    return text
}

internal fun bytesOf(what: String, text: String): ByteArray = wellFormed(what, text).encodeToByteArray()

/** Runs a native call; its failure becomes the exception of its kind. */
internal inline fun <T> native(call: () -> T): T = try {
    call()
} catch (failure: Failure.Failed) {
    throw exception(failure.kind, failure.text)
}
