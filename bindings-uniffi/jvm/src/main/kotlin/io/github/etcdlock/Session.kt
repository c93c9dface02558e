package io.github.etcdlock

import io.github.etcdlock.uniffi.ConnectOptions
import io.github.etcdlock.uniffi.Language
import io.github.etcdlock.uniffi.NativeSession
import io.github.etcdlock.uniffi.Outcome
import io.github.etcdlock.uniffi.connect
import java.time.Duration
import java.util.concurrent.CompletableFuture

/** What a session is to be like. All of it may be left out. */
public class Options {
    private var given = ConnectOptions(Language.JVM, null, null, null, null, null, null, null, null, null, null, null)

    internal fun build(): ConnectOptions = given

    private fun set(change: ConnectOptions.() -> ConnectOptions): Options = apply { given = given.change() }

    /** How long the lease lives without a renewal: at least 2 s, default 15 s. A crashed holder's lock is free after it. */
    public fun ttl(ttl: Duration): Options = set { copy(ttl = ttl.inSeconds()) }

    /** A prefix for every lock name of the session. */
    public fun namespace(prefix: String): Options = set { copy(namespace = wellFormed("the namespace", prefix)) }

    /** User name for etcd's own authentication; needs [password]. */
    public fun user(user: String): Options = set { copy(user = wellFormed("user", user)) }

    /** Password for etcd's own authentication; needs [user]. */
    public fun password(password: String): Options = set { copy(password = wellFormed("password", password)) }

    /** Certificates that may sign the server's: PEM text, or the path of a PEM file. */
    public fun ca(pem: String): Options = set { copy(ca = wellFormed("ca", pem)) }

    /** The client's certificate: PEM text, or the path of a PEM file; needs [key]. */
    public fun cert(pem: String): Options = set { copy(cert = wellFormed("cert", pem)) }

    /** The private key of [cert]: PEM text, or the path of a PEM file. */
    public fun key(pem: String): Options = set { copy(key = wellFormed("key", pem)) }

    /** The name in the server's certificate, where it differs from the endpoint's host. */
    public fun serverName(name: String): Options = set { copy(serverName = wellFormed("serverName", name)) }

    /** A label that others see in [Session.inspect]. Default `host:pid`. */
    public fun owner(label: String): Options = set { copy(owner = wellFormed("owner", label)) }

    /** How long to try to reach the target at first, default 5 s. It does not bound the session's life. */
    public fun connectTimeout(timeout: Duration): Options = set { copy(connectTimeout = timeout.inSeconds()) }

    /** Release a hold that is kept longer than this. Default: never. */
    public fun maxHold(limit: Duration): Options = set { copy(maxHold = limit.inSeconds()) }
}

/** One who holds a lock or waits for it. */
public class Contender internal constructor(
    /** Whether this one is first in the queue, and so holds the lock. */
    @get:JvmName("isHolder") public val isHolder: Boolean,
    /** The owner's label; empty for entries of other clients, as are host and language. */
    public val owner: String,
    public val host: String,
    /** The process id; 0 if unknown. */
    public val pid: Long,
    public val language: String,
    /** The fencing token it has, or will have when it holds the lock. */
    public val token: Long,
    /** How long ago it entered the queue; null if unknown. */
    public val age: Duration?,
    /** Its key in etcd. */
    public val key: String,
) {
    override fun toString(): String = "Contender(${if (isHolder) "holds" else "waits"}, owner=$owner, language=$language, token=$token)"
}

/** Counters of a session, from its start. */
public class Stats internal constructor(
    /** Locks acquired. */
    public val locks: Long,
    /** Of those, the ones that had to wait for another holder, here or elsewhere. */
    public val waits: Long,
    /** Of those, the ones that were passed on inside this process, in one request. */
    public val handOvers: Long,
    /** Places that the session has in queues now, as holder or as waiter. */
    public val liveTickets: Long,
    /** Holds lost, for whatever reason. */
    public val holdsLost: Long,
    /** Of those: no renewal was confirmed before the deadline. */
    public val lostDeadline: Long,
    /** Of those: the lease had expired or was revoked. */
    public val lostLeaseGone: Long,
    /** Of those: the key was deleted from outside. */
    public val lostKeyDeleted: Long,
    /** Of those: a guarded write was refused. */
    public val lostRefused: Long,
    /** Of those: kept longer than maxHold. */
    public val lostMaxHold: Long,
    /** Of those: the session was closed. */
    public val lostClosed: Long,
    /** Leases lost; the session got itself a new one after each. */
    public val leasesLost: Long,
    /** Renewals sent. */
    public val renewals: Long,
    /** Requests sent to the store by all sessions that share its connection. */
    public val requests: Long,
    /** Events heard by all sessions that share the connection. */
    public val watchEvents: Long,
    /** Connections and watch streams that had to be opened anew, by all sessions that share them. */
    public val reconnections: Long,
)

/**
 * A connection to where locks live, with one lease that is renewed in the background until the session is closed.
 *
 * Any number of threads and mutexes may share it. If its lease is lost, its holds are lost, and it gets itself a new
 * lease: waiters go on waiting, and new locks work. The end of the JVM closes it.
 */
public class Session internal constructor(internal val native: NativeSession) : AutoCloseable {
    /**
     * A mutex of this name. Local: nothing is sent. Mutexes of one name exclude each other, here and everywhere.
     *
     * @throws InvalidException for a name that is empty, over 1,024 bytes or has a NUL
     * @throws ClosedException
     */
    public fun mutex(name: String): Mutex = Mutex(native { native.mutex(wellFormed("the lock name", name)) })

    /**
     * Who holds the lock of this name and who waits for it, in order. Entries of etcd's own clients show too. Blocks for
     * one request, at most 5 s.
     *
     * @throws UnavailableException
     * @throws DeniedException
     */
    @Throws(InterruptedException::class)
    public fun inspect(name: String): List<Contender> = blocking { startInspect(name) }

    /** [inspect] without waiting. */
    public fun inspectAsync(name: String): CompletableFuture<List<Contender>> = startInspect(name).future()

    /** The TTL that etcd granted; it may be longer than what was asked for. */
    public val ttl: Duration get() = durationOf(native.ttl())

    /** The id of the lease, which changes when the session had to get a new one; null while it has none. */
    public val leaseId: Long? get() = native.leaseId()

    /** What the session has done so far. */
    public fun stats(): Stats = native.stats().run {
        Stats(
            locks,
            waits,
            handOvers,
            liveTickets,
            holdsLost,
            lostDeadline,
            lostLeaseGone,
            lostKeyDeleted,
            lostRefused,
            lostMaxHold,
            lostClosed,
            leasesLost,
            renewals,
            requests,
            watchEvents,
            reconnections,
        )
    }

    /** [close] within 5 s. */
    override fun close(): Unit = close(Duration.ofSeconds(5))

    /**
     * Releases all holds, revokes the lease and ends the session. Blocks until etcd has confirmed it; interrupting it
     * changes nothing. Closing twice is fine.
     *
     * @throws UnavailableException without a confirmation in time: the lease then ends by itself within its TTL
     */
    public fun close(timeout: Duration): Unit = blockingUninterruptibly { startClose(timeout) }

    /** [close] without waiting. */
    public fun closeAsync(timeout: Duration): CompletableFuture<Void?> = startClose(timeout).future().thenApply { null }

    internal fun startInspect(name: String) = Started(native.contenders(wellFormed("the lock name", name))) { outcome ->
        (outcome as Outcome.Contenders).contenders.map { c ->
            Contender(c.isHolder, c.owner, c.host, c.pid.toLong(), c.language, c.token, c.age?.let(::durationOf), c.key)
        }
    }

    internal fun startClose(timeout: Duration) = Started(native { native.close(timeout.inSeconds()) }) { }

    override fun toString(): String = native.text()

    public companion object {
        /** The version of the library. */
        @JvmStatic
        public val version: String get() = io.github.etcdlock.uniffi.version()

        /** Connects to `$ETCDLOCK_ENDPOINTS`, else to 127.0.0.1:2379. */
        @JvmStatic
        @Throws(InterruptedException::class)
        public fun connect(): Session = blocking { start(null, Options()) }

        /**
         * Connects to where locks live and opens a session. Blocks until connected; interrupting it leaves nothing behind.
         *
         * @param target `"127.0.0.1:2379"`, `"http://a:2379,http://b:2379"`, `"https://…"`, or `"memory:NAME"` (in this
         *   process); empty: `$ETCDLOCK_ENDPOINTS`, else 127.0.0.1:2379
         * @throws InvalidException at once for a bad target or option
         * @throws DeniedException at once for wrong credentials
         * @throws UnavailableException when the target cannot be reached in time
         */
        @JvmStatic
        @JvmOverloads
        @Throws(InterruptedException::class)
        public fun connect(target: String, options: Options = Options()): Session = blocking { start(listOf(target), options) }

        /** [connect] to a cluster of several members. */
        @JvmStatic
        @JvmOverloads
        @Throws(InterruptedException::class)
        public fun connect(target: List<String>, options: Options = Options()): Session = blocking { start(target, options) }

        /** [connect] without waiting. Cancelling the future leaves nothing behind. */
        @JvmStatic
        @JvmOverloads
        public fun connectAsync(target: String, options: Options = Options()): CompletableFuture<Session> =
            start(listOf(target), options).future()

        internal fun start(target: List<String>?, options: Options): Started<Session> {
            Library.start()
            target?.forEach { wellFormed("the target", it) }
            val call = native { connect(target, options.build()) }
            return Started(call, { it.native.close() }) { Session((it as Outcome.Session).session) }
        }
    }
}
