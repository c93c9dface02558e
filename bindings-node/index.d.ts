/// <reference lib="esnext.disposable" />

/**
 * What went wrong. `code` is one of a small fixed set, the same in every language; the message says
 * what happened, to which name and target, and what to do.
 */
export class EtcdLockError extends Error {
  /** For your own tests; the library makes its errors itself. */
  constructor(code: EtcdLockErrorCode, message: string, options?: { cause?: unknown })
  readonly name: 'EtcdLockError'
  readonly code: EtcdLockErrorCode
}

/**
 * - `ETCDLOCK_TIMEOUT`: the time given ran out before the lock was free
 * - `ETCDLOCK_BUSY`: somebody else holds the lock
 * - `ETCDLOCK_LOST`: the hold was lost before the call; another holder may be at work, so stop
 * - `ETCDLOCK_NOT_HELD`: there is nothing to release
 * - `ETCDLOCK_CANCELLED`: the call was cancelled (an aborted call rejects with its `signal.reason` instead)
 * - `ETCDLOCK_UNAVAILABLE`: the target could not be reached in time
 * - `ETCDLOCK_DENIED`: the target refused the credentials or the permission
 * - `ETCDLOCK_INVALID`: an argument breaks a rule
 * - `ETCDLOCK_CLOSED`: the session has been closed
 * - `ETCDLOCK_FORKED`, `ETCDLOCK_DEADLOCK`: cannot happen in Node
 * - `ETCDLOCK_INTERNAL`: a defect in this library
 */
export type EtcdLockErrorCode =
  | 'ETCDLOCK_TIMEOUT'
  | 'ETCDLOCK_BUSY'
  | 'ETCDLOCK_LOST'
  | 'ETCDLOCK_NOT_HELD'
  | 'ETCDLOCK_CANCELLED'
  | 'ETCDLOCK_UNAVAILABLE'
  | 'ETCDLOCK_DENIED'
  | 'ETCDLOCK_INVALID'
  | 'ETCDLOCK_CLOSED'
  | 'ETCDLOCK_FORKED'
  | 'ETCDLOCK_DEADLOCK'
  | 'ETCDLOCK_INTERNAL'

/** Options of {@link connect}. All may be left out. */
export interface ConnectOptions {
  /**
   * Seconds that the lease lives without a renewal: at least 2, at most a day, rounded up to whole ones.
   * A crashed holder's lock is free after about this time. Default 15.
   */
  ttl?: number
  /** A prefix for every lock name of the session, used as given. */
  namespace?: string
  /** User name for etcd's own authentication; needs `password`. */
  user?: string
  /** Password for etcd's own authentication; needs `user`. */
  password?: string
  /** Certificates that may sign the server's: PEM text, or the path of a PEM file. Default: the system's. */
  ca?: string
  /** Client certificate: PEM text or a path; needs `key`. */
  cert?: string
  /** Private key of the client certificate: PEM text or a path; needs `cert`. */
  key?: string
  /** The name that the server's certificate must carry, where it differs from the endpoint's host. */
  serverName?: string
  /** A label that others see in {@link Session.inspect}. Default `host:pid`. */
  owner?: string
  /** Milliseconds to try to reach the target at first. Default 5000. It does not bound the session's life. */
  connectTimeout?: number
  /** Milliseconds after which a hold is released by force, and so lost. Default: never. */
  maxHold?: number
  /** Ends the wait for the connection, not the session. The promise then rejects with `signal.reason`. */
  signal?: AbortSignal
}

/** Options of {@link Mutex.lock} and {@link Mutex.withLock}. */
export interface LockOptions {
  /** Milliseconds to wait at most; 0 is one try. Default: for ever. */
  timeout?: number
  /** Ends the wait. Any number of calls may share one signal. The promise rejects with `signal.reason`. */
  signal?: AbortSignal
}

/**
 * Connects and opens a lease, which the library's own thread renews until the session is closed: a blocked
 * event loop loses nothing.
 *
 * `target` is `"127.0.0.1:2379"`, `"http://a:2379,http://b:2379"`, `"https://…"`, a list of those, or
 * `"memory:NAME"` (in this process, workers included; the same NAME is the same place while a session is
 * open there). None: `$ETCDLOCK_ENDPOINTS`, else `127.0.0.1:2379`.
 *
 * Rejects with `ETCDLOCK_INVALID` at once for a bad target or option, `ETCDLOCK_DENIED` at once for wrong
 * credentials, `ETCDLOCK_UNAVAILABLE` after `connectTimeout`.
 */
export function connect(target?: string | readonly string[] | null, options?: ConnectOptions): Promise<Session>

/**
 * A target and one lease. Any number of mutexes may share a session. If its lease is lost, its holds are
 * lost, and the session gets itself a new lease: waiters go on waiting and new locks work.
 *
 * An open session does not keep the process alive. At the end of the process, of its worker, or when it is
 * garbage-collected together with all that came from it, it is closed.
 */
export class Session implements AsyncDisposable {
  private constructor()

  /**
   * A mutex of this name. Local: nothing is sent. Mutexes of one name exclude each other, in one session or
   * across the world. Throws `ETCDLOCK_INVALID` for a name that is empty, over 1,024 bytes, or has a NUL, and
   * `ETCDLOCK_CLOSED`.
   */
  mutex(name: string): Mutex

  /**
   * Who holds the lock of this name and who waits for it, in the order of the queue. Entries of etcd's own
   * clients show too, without the details that only ours give.
   */
  inspect(name: string): Promise<Contender[]>

  /** Seconds: the TTL that the store granted, which may be longer than what was asked for. */
  readonly ttl: number

  /** The id of the lease, which changes when the session had to get a new one; null while it has none. */
  readonly leaseId: bigint | null

  /** What the session has done so far. */
  stats(): Stats

  /**
   * Releases all holds, revokes the lease and ends the session. Settles within `timeout` milliseconds
   * (default 5000): rejects with `ETCDLOCK_UNAVAILABLE` if the store has not confirmed it by then; the
   * session is closed here all the same, and its lease ends by itself.
   */
  close(options?: { timeout?: number }): Promise<void>

  /** {@link close}, for `await using`. */
  [Symbol.asyncDispose](): Promise<void>
}

/**
 * One name, seen by one session. Not re-entrant. Any number of callers may share it: each `lock()` waits
 * its turn.
 */
export class Mutex {
  private constructor()

  /** The name, with the session's namespace. */
  readonly name: string

  /**
   * Waits its turn, through outages and re-elections, until the lock is held. Keeps the process alive while
   * it waits. Nothing is left behind if it rejects: with `ETCDLOCK_TIMEOUT`, with `signal.reason`, or with
   * `ETCDLOCK_DENIED`, `ETCDLOCK_CLOSED`, or `ETCDLOCK_UNAVAILABLE` if etcd refuses for a reason that waiting
   * does not mend.
   */
  lock(options?: LockOptions): Promise<Hold>

  /**
   * Takes the lock if it is free; null if somebody holds it. Never waits for other holders, and a failed
   * try writes nothing. Rejects with `ETCDLOCK_UNAVAILABLE` without an answer within 5 s.
   */
  tryLock(options?: { signal?: AbortSignal }): Promise<Hold | null>

  /**
   * Locks, runs `work`, unlocks, and gives back what `work` gave. An error of `work` always wins. Else it
   * rejects with `ETCDLOCK_LOST` if the hold was lost meanwhile. `work` is not interrupted by a loss: hand
   * `hold.signal` on to what it does.
   */
  withLock<T>(work: (hold: Hold) => T | PromiseLike<T>, options?: LockOptions): Promise<T>

  /** Releases the latest hold of this mutex; `ETCDLOCK_NOT_HELD` if there is none. See {@link Hold.unlock}. */
  unlock(): Promise<void>

  /** {@link Hold.isHeld} of the latest hold of this mutex. */
  isHeld(): boolean

  /** {@link Hold.remaining} of the latest hold of this mutex; 0 if it holds nothing. */
  remaining(): number

  /** The token of the latest hold of this mutex, even after its loss until it is unlocked; else null. */
  readonly token: bigint | null
}

/**
 * One successful acquisition. It ends with {@link unlock}, or with its loss, which is for good. A hold that
 * is garbage-collected together with its mutex is released too, with a process warning; so is one whose
 * worker or process ends. A held lock does not keep the process alive.
 */
export class Hold implements AsyncDisposable {
  private constructor()

  /**
   * The fencing token: strictly larger than that of every earlier hold of this name. Give it to the
   * resource with each write, and let the resource refuse smaller ones.
   */
  readonly token: bigint

  /** The name of the lock, with the session's namespace. */
  readonly name: string

  /** The mutex it came from. */
  readonly mutex: Mutex

  /** Whether {@link unlock} has been called. */
  readonly released: boolean

  /**
   * Whether the hold still owns the lock, as far as can be known here. A local read without I/O. False from
   * the deadline on, even if the event loop or the whole process was stopped meanwhile.
   */
  isHeld(): boolean

  /** Milliseconds that the hold is good for without another renewal; 0 if it is lost or released. */
  remaining(): number

  /** Throws `ETCDLOCK_LOST` or `ETCDLOCK_NOT_HELD` unless {@link isHeld}. */
  check(): void

  /**
   * Aborted when the hold is lost, with the `ETCDLOCK_LOST` error as its reason; never if it is released
   * first. Hand it to `fetch()` and the like.
   */
  readonly signal: AbortSignal

  /**
   * Writes `key` only if this hold still owns the lock, atomically in the store. The key is used as given,
   * without the namespace. Rejects with `ETCDLOCK_LOST` and nothing written, or with `ETCDLOCK_UNAVAILABLE`
   * without an answer within 5 s, and then it may or may not have been written.
   */
  put(key: string | Uint8Array, value: string | Uint8Array): Promise<void>

  /** Reads `key` only if this hold still owns the lock; null if there is no such key. A Buffer in Node. */
  get(key: string | Uint8Array): Promise<Uint8Array | null>

  /** Deletes `key` only if this hold still owns the lock; deleting what is not there is fine. */
  delete(key: string | Uint8Array): Promise<void>

  /**
   * Releases the lock, at once; resolves when the store has confirmed it. Rejects with `ETCDLOCK_LOST` if
   * the hold was lost before, `ETCDLOCK_NOT_HELD` if it was released before, and `ETCDLOCK_UNAVAILABLE`
   * without a confirmation within 5 s: then the key goes on being deleted in the background.
   */
  unlock(): Promise<void>

  /** {@link unlock}, for `await using`; does nothing after an `unlock()`. */
  [Symbol.asyncDispose](): Promise<void>
}

/** One who holds a lock or waits for it. */
export interface Contender {
  /** Whether this one is first in the queue, and so holds the lock. */
  isHolder: boolean
  /** The owner's label; empty for entries of other clients. */
  owner: string
  /** The host it runs on; empty if unknown. */
  host: string
  /** Its process id; 0 if unknown. */
  pid: number
  /** The language it is written in; empty if unknown. */
  language: string
  /** The fencing token that it has, or will have when it holds the lock. */
  token: bigint
  /** Milliseconds since it entered the queue, by the clocks of the two machines; absent if unknown. */
  age?: number
  /** Its key in the store. */
  key: string
}

/** Counters of a session, from its start. */
export interface Stats {
  /** Locks acquired. */
  locks: number
  /** Of those, the ones that had to wait for another holder, here or elsewhere. */
  waits: number
  /** Of those, the ones that were passed on inside this process, in one request. */
  handOvers: number
  /** Places that the session has in queues now, as holder or as waiter. */
  liveTickets: number
  /** Holds lost, for whatever reason. */
  holdsLost: number
  /** Of those: no renewal was confirmed before the deadline. */
  lostDeadline: number
  /** Of those: the lease had expired or was revoked. */
  lostLeaseGone: number
  /** Of those: the key was deleted from outside. */
  lostKeyDeleted: number
  /** Of those: a guarded write was refused. */
  lostRefused: number
  /** Of those: kept longer than `maxHold`. */
  lostMaxHold: number
  /** Of those: the session was closed. */
  lostClosed: number
  /** Leases lost; the session got itself a new one after each. */
  leasesLost: number
  /** Renewals sent. */
  renewals: number
  /** Requests sent to the store by all sessions that share its connection. */
  requests: number
  /** Events heard by all sessions that share the connection. */
  watchEvents: number
  /** Connections and watch streams that had to be opened anew, by all sessions that share them. */
  reconnections: number
}

/** The version of this package. */
export const version: string
