// The suite's driver for Node. See ../README.md.

import { createInterface } from 'node:readline'
import { writeSync } from 'node:fs'
import { connect, version, EtcdLockError } from '../../../bindings-node/index.mjs'

const [sessions, mutexes, holds, aborts] = [{}, {}, {}, {}]
// Node has no CLOCK_BOOTTIME; the runner says how far it is from CLOCK_MONOTONIC.
const offset = BigInt(process.env.DRIVER_BOOTTIME_OFFSET ?? 0)
const now = () => Number(process.hrtime.bigint() + offset)
const say = (line) => writeSync(1, JSON.stringify(line) + '\n')

function state(mutex) {
  const seen = now()
  return { held: mutex.isHeld(), remaining: Math.floor(mutex.remaining()), token: Number(mutex.token ?? 0), seen }
}

function granted(name, hold) {
  if (!hold) return { kind: 'BUSY', message: '' }
  holds[name] = hold
  const lost = () =>
    say({ event: 'lost', mutex: name, token: Number(hold.token), reason: hold.signal.reason.message, at: now() })
  if (hold.signal.aborted) lost()
  else hold.signal.addEventListener('abort', lost)
  return state(hold.mutex)
}

const calls = {
  async connect(r) {
    const { ttl, namespace, owner, user, password, connect_timeout: connectTimeout, max_hold: maxHold } = r
    const given = { ttl: ttl && ttl / 1000, namespace, owner, user, password, connectTimeout, maxHold }
    const options = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined))
    const session = (sessions[r.session] = await connect(r.target, options))
    return { ttl: session.ttl * 1000, lease: String(session.leaseId ?? 0) }
  },
  mutex(r) {
    mutexes[r.mutex] = sessions[r.session].mutex(r.name)
  },
  async lock(r) {
    const { signal } = (aborts[r.id] = new AbortController())
    return granted(r.mutex, await mutexes[r.mutex].lock(r.timeout === undefined ? { signal } : { timeout: r.timeout, signal }))
  },
  cancel: (r) => aborts[r.op]?.abort(new EtcdLockError('ETCDLOCK_CANCELLED', '')),
  try_lock: async (r) => granted(r.mutex, await mutexes[r.mutex].tryLock()),
  unlock: (r) => mutexes[r.mutex].unlock(),
  state: (r) => state(mutexes[r.mutex]),
  check: (r) => holds[r.mutex].check(),
  put: (r) => holds[r.mutex].put(r.key, r.value),
  get: async (r) => ({ value: (await holds[r.mutex].get(r.key))?.toString() ?? null }),
  delete: (r) => holds[r.mutex].delete(r.key),
  async inspect(r) {
    const shown = ({ isHolder, token, age, ...rest }) => ({ holder: isHolder, token: Number(token), age: Math.floor(age ?? -1), ...rest })
    return { contenders: (await sessions[r.session].inspect(r.name)).map(shown) }
  },
  stats(r) {
    const { locks, holdsLost, leasesLost, renewals, requests } = sessions[r.session].stats()
    return { locks, holds_lost: holdsLost, leases_lost: leasesLost, renewals, requests }
  },
  close: (r) => sessions[r.session].close({ timeout: r.timeout ?? 5000 }),
}

async function serve(r, from) {
  let result
  try {
    result = await calls[r.do](r)
  } catch (error) {
    if (!(error instanceof EtcdLockError)) throw error
    result = { kind: error.code.replace('ETCDLOCK_', ''), message: error.message }
  }
  delete aborts[r.id]
  say({ id: r.id, from, at: now(), ...result })
}

say({ driver: 'node', version, lacks: '' })
const lines = createInterface({ input: process.stdin })
lines.on('line', (line) => serve(JSON.parse(line), now()))
lines.on('close', () => process.exit())
