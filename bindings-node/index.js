'use strict'

// What users see. All that is about locks is in the core; here calls get numbers, and the results that
// the core's own thread sends by post settle them. See index.d.ts for what everything means.

const { setMaxListeners } = require('node:events')
const { isUint8Array } = require('node:util').types
const { isMainThread } = require('node:worker_threads')
const { PostBox, isHeld, shutdown } = require('./native.js')

const inspectAs = Symbol.for('nodejs.util.inspect.custom')
const asyncDispose = Symbol.asyncDispose ?? Symbol.for('Symbol.asyncDispose')

/** How long the end of the process waits for the release of its locks, in milliseconds. */
const EXIT_LIMIT = 1000
const CLOSE_LIMIT = 5000

class EtcdLockError extends Error {
  constructor(code, message, options) {
    super(message, options)
    this.code = code
  }

  get name() {
    return 'EtcdLockError'
  }
}

/** Any number may listen to a signal that is made to be given away. */
function loudController() {
  const controller = new AbortController()
  setMaxListeners(0, controller.signal)
  return controller
}

const invalid = (message) => new EtcdLockError('ETCDLOCK_INVALID', message)

/** Throws, here and now, what the native side found wrong. */
function check(failure) {
  if (failure) throw new EtcdLockError(failure.code, failure.message)
}

// ---- Calls and their results

/** What to do with the result of each number. */
const expected = new Map()
let lastNumber = 0
let pending = 0
let shutsDownAtExit = false

const post = new PostBox(() => {
  for (const { id, error, value } of post.take()) {
    const settle = expected.get(id)
    expected.delete(id)
    settle?.({ error, value })
  }
})

function expect(settle) {
  do lastNumber = (lastNumber + 1) >>> 0
  while (expected.has(lastNumber))
  expected.set(lastNumber, settle)
  return lastNumber
}

/**
 * Starts a call and waits for it. While there is one, the process stays alive. An error is made here,
 * in the caller's async stack, so that its trace shows who called. If `signal` was aborted before the
 * result is here, its reason is thrown, and what was granted all the same goes to `giveBack`.
 */
async function call(start, signal, giveBack) {
  if (signal?.aborted) throw signal.reason
  let id
  const settled = new Promise((settle) => {
    id = expect(settle)
  })
  try {
    start(id)
  } catch (error) {
    expected.delete(id)
    throw error
  }
  if (pending++ === 0) post.keepAlive(true)
  if (signal) cancelOnAbort(signal, id)
  const { error, value } = await settled
  if (--pending === 0) post.keepAlive(false)
  if (signal) {
    dontCancelOnAbort(signal, id)
    if (signal.aborted) {
      if (value) giveBack(value)
      throw signal.reason
    }
  }
  check(error)
  return value
}

/** A result that nobody waits for, and that does not keep the process alive. */
function callAndForget(start) {
  start(expect(() => {}))
}

// One listener for each signal, however many calls share it: Node warns of more than ten.
const abortable = new WeakMap()

function cancelOnAbort(signal, id) {
  let calls = abortable.get(signal)
  if (!calls) {
    const ids = new Set()
    calls = { ids, cancel: () => ids.forEach((id) => post.cancel(id)) }
    abortable.set(signal, calls)
    signal.addEventListener('abort', calls.cancel)
  }
  calls.ids.add(id)
}

function dontCancelOnAbort(signal, id) {
  const calls = abortable.get(signal)
  calls.ids.delete(id)
  if (calls.ids.size === 0) {
    abortable.delete(signal)
    signal.removeEventListener('abort', calls.cancel)
  }
}

// ---- What users give

const show = (value) => {
  try {
    return typeof value === 'string' ? JSON.stringify(value) : String(value)
  } catch {
    return Object.prototype.toString.call(value)
  }
}

function options(given, known) {
  if (given === undefined || given === null) return {}
  if (typeof given !== 'object') throw invalid(`the options ${show(given)} are not an object`)
  for (const [name, value] of Object.entries(given)) {
    if (!Object.hasOwn(known, name)) {
      throw invalid(`the option ${show(name)} is not known; there are ${Object.keys(known).join(', ')}`)
    }
    if (value !== undefined && value !== null) known[name](name, value)
  }
  return given
}

function string(name, value) {
  if (typeof value !== 'string') throw invalid(`${name} ${show(value)} is not a string`)
  wellFormed(name, value)
}

const hasHalfAPair = (text) => /\p{Surrogate}/u.test(text)

/** Nobody is to see it, in a message either. */
function secret(name, value) {
  if (typeof value !== 'string') throw invalid(`${name} is not a string (its value is not shown)`)
  if (hasHalfAPair(value)) throw invalid(`${name} is not well-formed (its value is not shown)`)
}

/** Half a surrogate pair would become U+FFFD on the way, and names that differ one and the same. */
function wellFormed(name, value) {
  if (hasHalfAPair(value)) throw invalid(`${name} ${show(value)} is not well-formed: it has half of a surrogate pair`)
}

function time(name, value) {
  if (typeof value !== 'number' || !(value >= 0)) {
    throw invalid(`${name} ${show(value)} is not a number of ${name === 'ttl' ? 'seconds' : 'milliseconds'}, 0 or more`)
  }
}

function abortSignal(name, value) {
  if (typeof value.aborted !== 'boolean' || typeof value.addEventListener !== 'function') {
    throw invalid(`${name} ${show(value)} is not an AbortSignal`)
  }
}

const connectOptions = {
  ttl: time,
  namespace: string,
  user: string,
  password: secret,
  ca: string,
  cert: string,
  key: secret,
  serverName: string,
  owner: string,
  connectTimeout: time,
  maxHold: time,
  signal: abortSignal,
}
const lockOptions = { timeout: time, signal: abortSignal }
const tryOptions = { signal: abortSignal }
const closeOptions = { timeout: time }

function target(given) {
  if (given === undefined || given === null) return ['']
  const list = Array.isArray(given) ? given : [given]
  for (const endpoint of list) string('target', endpoint)
  return list
}

function bytes(name, value) {
  if (typeof value === 'string') {
    wellFormed(name, value)
    return Buffer.from(value)
  }
  // Also one of another realm, as `vm` and jest's jsdom have.
  if (isUint8Array(value)) return value
  throw invalid(`${name} ${show(value)} is neither a string nor a Uint8Array`)
}

// ---- Sessions

async function connect(at, given) {
  const endpoints = target(at)
  const { signal, ...rest } = options(given, connectOptions)
  if (isMainThread && !shutsDownAtExit) {
    shutsDownAtExit = true
    // Workers need none: what a worker had is released when its environment ends.
    process.on('exit', () => {
      post.close()
      shutdown(EXIT_LIMIT)
    })
  }
  for (const name in rest) rest[name] ??= undefined
  const native = await call(
    (id) => post.connect(id, endpoints, rest),
    signal,
    (native) => callAndForget((id) => native.close(id, CLOSE_LIMIT)),
  )
  return new Session(native)
}

/** Only this file makes sessions, mutexes and holds. */
const guard = (native) => {
  if (native === undefined) throw new TypeError('Illegal constructor: call connect(), mutex() or lock()')
}

class Session {
  #native

  constructor(native) {
    guard(native)
    this.#native = native
  }

  mutex(name) {
    string('the lock name', name)
    const made = this.#native.mutex(name)
    if (made.code) check(made)
    return new Mutex(made)
  }

  async inspect(name) {
    string('the lock name', name)
    return call((id) => this.#native.inspect(id, name))
  }

  get ttl() {
    return this.#native.ttl()
  }

  get leaseId() {
    return this.#native.leaseId() ?? null
  }

  stats() {
    return this.#native.stats()
  }

  async close(given) {
    const { timeout } = options(given, closeOptions)
    await call((id) => this.#native.close(id, timeout ?? CLOSE_LIMIT))
  }

  async [asyncDispose]() {
    await this.close()
  }

  [inspectAs]() {
    return `Session { lease: ${this.leaseId ?? 'none'}, ttl: ${this.ttl} }`
  }
}

// ---- Mutexes

class Mutex {
  #native
  #name
  /** The latest hold, for those who say mutex.unlock() and keep no hold themselves. */
  #hold

  constructor(native) {
    guard(native)
    this.#native = native
    this.#name = native.name()
  }

  get name() {
    return this.#name
  }

  async lock(given) {
    const { timeout, signal } = options(given, lockOptions)
    return this.#acquired(await call((id) => this.#native.lock(id, timeout), signal, release))
  }

  async tryLock(given) {
    const { signal } = options(given, tryOptions)
    const native = await call((id) => this.#native.tryLock(id), signal, release)
    return native ? this.#acquired(native) : null
  }

  #acquired(native) {
    return (this.#hold = new Hold(native, this))
  }

  async withLock(work, given) {
    if (typeof work !== 'function') throw invalid(`what withLock() is to run, ${show(work)}, is not a function`)
    const hold = await this.lock(given)
    let result
    try {
      result = await work(hold)
    } catch (error) {
      // The body's own error wins, and the release has nothing to add.
      await hold[asyncDispose]().catch(() => {})
      throw error
    }
    await hold[asyncDispose]()
    return result
  }

  async unlock() {
    if (this.#hold && !this.#hold.released) return this.#hold.unlock()
    return call((id) => this.#native.unlock(id))
  }

  isHeld() {
    return this.#hold !== undefined && this.#hold.isHeld()
  }

  remaining() {
    return this.#hold?.remaining() ?? 0
  }

  get token() {
    return this.#hold && !this.#hold.released ? this.#hold.token : null
  }

  [inspectAs]() {
    return `Mutex { name: ${show(this.name)}, held: ${this.isHeld()} }`
  }
}

// ---- Holds

function release(native) {
  callAndForget((id) => native.unlock(id))
}

/** Releases holds that nobody can release any more. */
const forgotten = new FinalizationRegistry((state) => {
  const error = new EtcdLockError(
    'ETCDLOCK_LOST',
    `the hold on ${JSON.stringify(state.name)} (token ${state.token}) was garbage-collected without unlock() and is ` +
      'released now; keep it until you unlock it, or use withLock() or await using',
  )
  const wasHeld = isHeld(state.native.place())
  stopListening(state)
  release(state.native)
  // Who was told of a loss need not unlock.
  if (!wasHeld) return
  process.emitWarning(error.message, { type: 'EtcdLockWarning', code: 'ETCDLOCK_FORGOTTEN_HOLD' })
  state.controller?.abort(error)
})

function stopListening(state) {
  if (state.lossNumber !== undefined) expected.delete(state.lossNumber)
  state.lossNumber = undefined
}

class Hold {
  #state
  #native
  #place
  /** Keeps the session open: it closes with its last mutex. */
  #mutex

  constructor(native, mutex) {
    guard(native)
    this.#native = native
    this.#place = native.place()
    this.#mutex = mutex
    this.#state = { native, name: mutex.name, token: native.token(), released: false, controller: undefined, lossNumber: undefined }
    forgotten.register(this, this.#state, this)
  }

  get token() {
    return this.#state.token
  }

  get name() {
    return this.#state.name
  }

  get mutex() {
    return this.#mutex
  }

  get released() {
    return this.#state.released
  }

  isHeld() {
    return isHeld(this.#place)
  }

  remaining() {
    return this.#native.remaining()
  }

  check() {
    check(this.#native.check())
  }

  get signal() {
    const state = this.#state
    const controller = (state.controller ??= loudController())
    if (controller.signal.aborted || state.released) return controller.signal
    const abort = ({ code, message }) => controller.abort(new EtcdLockError(code, message))
    // The news may still be waiting for the event loop.
    const failure = this.#native.check()
    if (failure) {
      stopListening(state)
      abort(failure)
    } else if (state.lossNumber === undefined) {
      state.lossNumber = expect(({ error }) => abort(error))
      this.#native.onLost(state.lossNumber)
    }
    return controller.signal
  }

  async put(key, value) {
    const [k, v] = [bytes('the key', key), bytes('the value', value)]
    await call((id) => this.#native.put(id, k, v))
  }

  async get(key) {
    const k = bytes('the key', key)
    return (await call((id) => this.#native.get(id, k))) ?? null
  }

  async delete(key) {
    const k = bytes('the key', key)
    await call((id) => this.#native.delete(id, k))
  }

  async unlock() {
    const state = this.#state
    state.released = true
    forgotten.unregister(this)
    stopListening(state)
    await call((id) => this.#native.unlock(id))
  }

  async [asyncDispose]() {
    if (!this.#state.released) await this.unlock()
  }

  [inspectAs]() {
    return `Hold { name: ${show(this.name)}, token: ${this.token}, held: ${this.isHeld()} }`
  }
}

module.exports = { connect, Session, Mutex, Hold, EtcdLockError, version: require('./package.json').version }
