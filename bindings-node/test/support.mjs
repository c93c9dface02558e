// What the suites share: the stores, etcdctl, and programs in processes of their own.

import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { promisify } from 'node:util'
import { fileURLToPath } from 'node:url'

export const etcd = process.env.ETCDLOCK_ENDPOINTS
if (!etcd) throw new Error('no etcd to test against: run `make -C bindings-node test`')

/** Every behaviour is shown on both. */
export const stores = [
  ['etcd', etcd],
  ['memory', 'memory:'],
]

export const entry = fileURLToPath(new URL('../index.js', import.meta.url))

let names = 0
export const freshName = () => `/node/${process.pid}/${++names}`

/** A look at etcd, or a hand in it, from outside. */
export async function etcdctl(...args) {
  const env = { ...process.env, ETCDCTL_API: '3' }
  const { stdout } = await promisify(execFile)('etcdctl', ['--endpoints', etcd, ...args], { env })
  return stdout.trim()
}

/** The keys under a lock's name. */
export async function keysOf(name) {
  const out = await etcdctl('get', '--prefix', `${name}/`, '--keys-only')
  return out.split('\n').filter(Boolean)
}

/** As long as a hang takes: longer than a lease lives that nobody could revoke in time. */
export const HANG = 60_000

/** Waits until `check` gives something true, looking again and again: for what only a look can tell. */
export async function until(what, check, limit = HANG) {
  const end = performance.now() + limit
  for (;;) {
    const seen = await check()
    if (seen) return seen
    if (performance.now() > end) throw new Error(`${what}: not within ${limit} ms`)
    await new Promise((resume) => setTimeout(resume, 10))
  }
}

export const keysAreGone = (name) => until(`no key of ${name}`, async () => (await keysOf(name)).length === 0)

/** Waits for the loss of a hold, which by design keeps no process alive by itself. */
export async function lost(hold) {
  const awake = setInterval(() => {}, 60_000)
  try {
    if (!hold.signal.aborted) await once(hold.signal, 'abort')
  } finally {
    clearInterval(awake)
  }
}

/** One turn of the event loop. */
export const tick = () => new Promise((resume) => setImmediate(resume))

/**
 * A program in a process of its own, with `connect`, `EtcdLockError`, `say` (a line to us) and `heard` (a
 * promise for a line from us) at hand.
 */
export function start(code, { flags = [], env = {} } = {}) {
  const source = `
    const { connect, EtcdLockError } = require(${JSON.stringify(entry)})
    const { writeSync } = require('node:fs')
    const say = (line) => writeSync(1, line + '\\n')
    const heard = () => new Promise((resume) => { process.stdin.ref(); process.stdin.once('data', () => { process.stdin.unref(); resume() }) })
    ;(async () => { ${code} })()`
  const args = ['--expose-gc', '--unhandled-rejections=strict', ...flags, '-e', source]
  const child = spawn(process.execPath, args, { env: { ...process.env, ...env }, stdio: 'pipe' })
  let stdout = ''
  let stderr = ''
  let more = () => {}
  child.stdout.on('data', (data) => {
    stdout += data
    more()
  })
  child.stderr.on('data', (data) => (stderr += data))
  const closed = once(child, 'close')
  closed.then(() => more())
  return {
    child,
    /** Waits for a line. */
    async says(line) {
      while (!stdout.split('\n').includes(line)) {
        if (child.exitCode !== null || child.signalCode !== null) throw new Error(`it never said ${line}: ${stdout}${stderr}`)
        await new Promise((resume) => (more = resume))
      }
    },
    tell: () => child.stdin.write('\n'),
    /** How it ended. */
    async ended() {
      const [code, signal] = await closed
      return { code, signal, stdout, stderr }
    },
  }
}

/** Runs a program to its end. */
export const run = (code, options) => start(code, options).ended()
