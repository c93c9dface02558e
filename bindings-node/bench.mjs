// Figures: `make bench`. Needs etcd at $ETCDLOCK_ENDPOINTS, and the Rust peer for comparison.

import { execFileSync, spawn } from 'node:child_process'
import { existsSync } from 'node:fs'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import { connect } from './index.mjs'

const path = (name) => fileURLToPath(new URL(name, import.meta.url))
const at = (list, part) => [...list].sort((a, b) => a - b)[Math.floor(list.length * part)]
const say = (what, value) => console.log(`${what.padEnd(52)} ${value}`)
const etcd = process.env.ETCDLOCK_ENDPOINTS

// Load time, each in a process of its own, of which Node has no part.
const load = `const start = performance.now(); require(${JSON.stringify(path('index.js'))}); console.log(performance.now() - start)`
const loads = Array.from({ length: 21 }, () => Number(execFileSync(process.execPath, ['-e', load])))
say('require(), median of 21 processes', `${at(loads, 0.5).toFixed(1)} ms`)

const session = await connect(etcd, { ttl: 10 })

// isHeld(), best of five.
const hold = await session.mutex('/bench/held').lock()
const calls = 2_000_000
const rounds = Array.from({ length: 5 }, () => {
  const start = process.hrtime.bigint()
  for (let n = 0; n < calls; n++) if (!hold.isHeld()) throw new Error('lost')
  return Number(process.hrtime.bigint() - start) / calls
})
say('isHeld()', `${Math.min(...rounds).toFixed(0)} ns`)
await hold.unlock()

// Uncontended lock + unlock, in turns with the Rust peer, because the machine's pace changes.
async function ours(target, count) {
  const own = await connect(target, { ttl: 10 })
  const mutex = own.mutex('/bench/ours')
  const times = []
  for (let n = 0; n < count; n++) {
    const start = process.hrtime.bigint()
    const hold = await mutex.lock()
    await hold.unlock()
    times.push(Number(process.hrtime.bigint() - start) / 1000)
  }
  await own.close()
  return times
}

async function rust(target, count) {
  const peer = spawn(path('../target/release/examples/peer'), ['rounds', target, '/bench/rust', String(count)], { stdio: ['pipe', 'pipe', 'inherit'] })
  const times = []
  for await (const line of createInterface(peer.stdout)) {
    if (line === 'ready') peer.stdin.write('\n')
    else if (line.startsWith('enter')) times.push(Number(line.split(' ')[2]) / 1000)
  }
  return times
}

const hasRust = existsSync(path('../target/release/examples/peer'))
for (const [name, target] of [
  ['etcd', etcd],
  ['memory', 'memory:bench'],
]) {
  const [node, peer] = [[], []]
  await ours(target, 300)
  for (let turn = 0; turn < 8; turn++) {
    node.push(...(await ours(target, 500)))
    if (hasRust) peer.push(...(await rust(target, 500)))
  }
  say(`lock + unlock, ${name}, Node`, `p50 ${at(node, 0.5).toFixed(0)} us   p99 ${at(node, 0.99).toFixed(0)} us`)
  if (hasRust) {
    say(`lock + unlock, ${name}, Rust (blocking)`, `p50 ${at(peer, 0.5).toFixed(0)} us   p99 ${at(peer, 0.99).toFixed(0)} us`)
    say(`    Node on top of that`, `p50 ${(at(node, 0.5) - at(peer, 0.5)).toFixed(0)} us`)
  }
}

// 10,000 pending locks of one name.
const waiters = 10_000
const mutex = session.mutex('/bench/pending')
const first = await mutex.lock()
const memory = () => {
  for (let n = 0; n < 4; n++) gc()
  return process.memoryUsage()
}
const before = memory()
const controller = new AbortController()
const pending = Array.from({ length: waiters }, () => mutex.lock({ signal: controller.signal }).catch((error) => error))
await mutex.tryLock() // answered after all of them have been queued
const during = memory()
say('10,000 pending locks, memory for each', `${((during.rss - before.rss) / waiters).toFixed(0)} bytes (${((during.heapUsed - before.heapUsed) / waiters).toFixed(0)} of them JavaScript's)`)
const start = performance.now()
controller.abort()
await Promise.all(pending)
say('    cancelled by one signal in', `${(performance.now() - start).toFixed(0)} ms`)
await first.unlock()

const queue = Array.from({ length: waiters }, () => mutex.withLock(() => {}))
const began = performance.now()
await Promise.all(queue)
say('10,000 hand-overs in this process', `${((performance.now() - began) / waiters * 1000).toFixed(0)} us each`)
await session.close()
