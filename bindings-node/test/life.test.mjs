// Where programs go wrong: blocked, stopped, ended in every state, in workers, and forgetful. The numbers
// are those of SAFETY.md's table.

import assert from 'node:assert/strict'
import { describe, it } from 'node:test'
import { Worker } from 'node:worker_threads'
import { connect } from '../index.mjs'
import { HANG, entry, etcd, etcdctl, freshName, keysAreGone, keysOf, run, start, stores, until } from './support.mjs'

const clean = (stdout) => ({ code: 0, signal: null, stdout, stderr: '' })

// Side by side: they wait. A TTL that a busy machine does not miss by itself.
describe('a blocked or stopped program', { concurrency: true }, () => {
  for (const [store, target] of stores) {
    it(`row 32: holds its lock while its event loop is blocked for three TTLs (${store})`, async () => {
      const name = freshName()
      const program = start(`
        const session = await connect('${target}', { ttl: 5 })
        const hold = await session.mutex('${name}').lock()
        hold.signal.onabort = () => say('lost')
        say('held')
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 15000)
        say('isHeld ' + hold.isHeld() + ' aborted ' + hold.signal.aborted)
        await hold.unlock()
        say('end')`)
      await program.says('held')
      if (store === 'etcd') {
        const other = await connect(target)
        await assert.rejects(other.mutex(name).lock({ timeout: 12_000 }), { code: 'ETCDLOCK_TIMEOUT' })
        await other.close()
      }
      assert.deepEqual(await program.ended(), clean('held\nisHeld true aborted false\nend\n'))
    })
  }

  it('row 32: knows of a loss at once when its event loop was blocked during it', async () => {
    const name = freshName()
    const program = start(`
      const session = await connect(undefined, { ttl: 2 })
      const hold = await session.mutex('${name}').lock()
      const { signal } = hold
      say('held')
      // Neither messages nor timers get through here, and isHeld() says so all the same.
      while (hold.isHeld());
      say('aborted ' + signal.aborted + ' ' + hold.signal.aborted + ' ' + hold.signal.reason.code)
      await hold.unlock().catch((error) => say(error.code))`)
    await program.says('held')
    const [key] = await keysOf(name)
    await etcdctl('del', key)
    assert.deepEqual(await program.ended(), clean('held\naborted false true ETCDLOCK_LOST\nETCDLOCK_LOST\n'))
  })

  it('row 1: stopped past its TTL does not hold the lock on its first look, and cannot write', async () => {
    const name = freshName()
    const program = start(`
      const session = await connect(undefined, { ttl: 2 })
      const hold = await session.mutex('${name}').lock()
      say('held')
      const { fstatSync, readSync } = require('node:fs')
      readSync(0, Buffer.alloc(1))
      say('isHeld ' + hold.isHeld() + ' remaining ' + hold.remaining())
      await hold.put('${name}.state', 'late').catch((error) => say(error.code))
      await hold.unlock().catch((error) => say(error.code))`)
    await program.says('held')
    program.child.kill('SIGSTOP')
    const session = await connect(etcd)
    const next = await session.mutex(name).lock({ timeout: HANG })
    await next.put(`${name}.state`, 'next')
    program.tell()
    program.child.kill('SIGCONT')
    assert.deepEqual(await program.ended(), clean('held\nisHeld false remaining 0\nETCDLOCK_LOST\nETCDLOCK_LOST\n'))
    assert.equal(Buffer.from(await next.get(`${name}.state`)).toString(), 'next')
    await next.unlock()
    await session.close()
  })
})

describe('the end of a process', () => {
  for (const [store, target] of stores) {
    it(`comes by itself with a lock held and a session open (${store})`, async () => {
      const name = freshName()
      const held = await run(`
        const session = await connect('${target}')
        const hold = await session.mutex('${name}').lock()
        hold.signal.onabort = () => say('lost')
        say(String(hold.isHeld()))`)
      assert.deepEqual(held, clean('true\n'))
      assert.deepEqual(await keysOf(name), [], 'released')
    })

    it(`waits for a lock() that is pending (${store})`, async () => {
      const ended = await run(`
        const session = await connect('${target}')
        const mutex = session.mutex('${freshName()}')
        const hold = await mutex.lock()
        mutex.lock({ timeout: 300 }).catch((error) => say(error.code))`)
      assert.deepEqual(ended, clean('ETCDLOCK_TIMEOUT\n'))
    })
  }

  const states = {
    'with the library loaded': ``,
    'connecting': `connect(undefined)`,
    'connecting to nobody': `connect('127.0.0.1:1')`,
    'connected': `await connect()`,
    'holding': `await (await connect()).mutex(name).lock()`,
    'locking': `(await connect()).mutex(name).lock()`,
    'trying': `(await connect()).mutex(name).tryLock()`,
    'waiting': `const mutex = (await connect()).mutex(name); await mutex.lock(); mutex.lock(); mutex.lock({ timeout: 5000 })`,
    'unlocking': `(await (await connect()).mutex(name).lock()).unlock()`,
    'writing': `(await (await connect()).mutex(name).lock()).put(name + '.state', 'x')`,
    'closing': `const session = await connect(); await session.mutex(name).lock(); session.close()`,
    'with a signal': `(await (await connect()).mutex(name).lock()).signal.onabort = () => say('lost')`,
    'with a lost hold': `const s = await connect(); const h = await s.mutex(name).lock(); await s.close(); h.signal`,
  }
  const ways = {
    'process.exit': ['process.exit(7)', 7, /^$/],
    'an uncaught error': [`setImmediate(() => { throw new Error('on purpose') })`, 1, /^(?!.*etcdlock).*on purpose.*Node\.js v[\d.]+\s*$/s],
  }
  for (const [state, code] of Object.entries(states)) {
    for (const [way, [end, expected, noise]] of Object.entries(ways)) {
      it(`rows 29 and 33: by ${way} ${state}: exit code right, no noise, no key`, async () => {
        const name = freshName()
        const { code: exitCode, signal, stdout, stderr } = await run(`const name = '${name}';\n${code};\n${end}`)
        assert.deepEqual({ exitCode, signal, stdout }, { exitCode: expected, signal: null, stdout: '' }, stderr)
        assert.match(stderr, noise)
        await keysAreGone(name)
      })
    }
  }

  it('row 29: does not wait long for an etcd that does not answer', async () => {
    // A server that accepts and says nothing once the session is there.
    let lag = 0
    let last = performance.now()
    const heartbeat = setInterval(() => {
      lag = Math.max(lag, performance.now() - last - 20)
      last = performance.now()
    }, 20)
    const { code, stdout, stderr } = await run(`
      const net = require('node:net')
      const [host, port] = process.env.ETCDLOCK_ENDPOINTS.split(':')
      const pairs = []
      const relay = net.createServer((near) => {
        const far = net.connect(Number(port), host)
        near.pipe(far); far.pipe(near)
        near.on('error', () => {}); far.on('error', () => {})
        pairs.push([near, far])
      })
      await new Promise((resume) => relay.listen(0, '127.0.0.1', resume))
      const session = await connect('127.0.0.1:' + relay.address().port, { ttl: 2 })
      const hold = await session.mutex('${freshName()}').lock()
      for (const [near, far] of pairs) { near.unpipe(far); near.pause(); far.unpipe(near) }
      const start = performance.now()
      process.on('exit', () => say(String(performance.now() - start)))
      process.exit(5)`)
    clearInterval(heartbeat)
    assert.deepEqual({ code, stderr }, { code: 5, stderr: '' })
    // Beside what the machine itself took for a turn of an event loop meanwhile.
    assert.ok(Number(stdout) < 2000 + 20 * lag, `${stdout} ms, and the machine was ${lag} ms late at most`)
  })
})

describe('workers', () => {
  const worker = (code, workerData) => {
    const source = `
      const { parentPort, workerData } = require('node:worker_threads')
      const { connect } = require(${JSON.stringify(entry)})
      ;(async () => { ${code} })()`
    return new Worker(source, { eval: true, workerData })
  }
  const message = (w) =>
    new Promise((resolve, reject) => {
      w.once('message', resolve)
      w.once('error', reject)
    })

  for (const [store, target] of stores) {
    it(`row 33: 100 are terminated while holding, waiting, connecting, with no crash and no key left (${store})`, async () => {
      const name = freshName()
      // In memory the place lasts as long as somebody is there.
      const session = await connect(target)
      const states = [
        `const s = await connect(target); globalThis.hold = await s.mutex(name + '/held').lock(); ready()`,
        `const s = await connect(target); const m = s.mutex(name + '/two'); await m.lock(); m.lock(); ready()`,
        `connect(target).then((s) => s.mutex(name + '/held').lock()); ready()`,
        `const s = await connect(target); for (let n = 0; n < 50; n++) s.mutex(name + '/many').lock().then((h) => h.unlock()); ready()`,
        `const s = await connect(target); const h = await s.mutex(name + '/past').lock(); h.signal.onabort = () => {}; h.unlock(); ready()`,
      ]
      for (let batch = 0; batch < 20; batch++) {
        const workers = states.map((code) =>
          worker(`const { target, name } = workerData; const ready = () => parentPort.postMessage(''); setInterval(() => {}, 1000); ${code}`, {
            target,
            name: `${name}/${batch}`,
          }),
        )
        await Promise.all(workers.map((w) => message(w).then(() => w.terminate())))
      }
      for (let batch = 0; batch < 20; batch++) {
        for (const lock of ['held', 'two', 'many', 'past']) {
          const hold = await session.mutex(`${name}/${batch}/${lock}`).lock({ timeout: HANG })
          assert.equal((await session.inspect(hold.name)).length, 1)
          await hold.unlock()
        }
      }
      if (store === 'etcd') assert.deepEqual(await keysOf(name), [])
      await session.close()
    })

    it(`exclude each other and the main thread (${store})`, async () => {
      const name = freshName()
      const session = await connect(target)
      const numbers = new Int32Array(new SharedArrayBuffer(8))
      const workers = Array.from({ length: 3 }, () =>
        worker(
          `const { target, name, numbers } = workerData
           const session = await connect(target)
           for (let n = 0; n < 50; n++) {
             await session.mutex(name).withLock(async () => {
               if (Atomics.add(numbers, 0, 1) !== 0) Atomics.add(numbers, 1, 1000)
               await new Promise(setImmediate)
               Atomics.sub(numbers, 0, 1)
               Atomics.add(numbers, 1, 1)
             })
           }
           await session.close()`,
          { target, name, numbers },
        ),
      )
      await Promise.all(workers.map((w) => new Promise((resolve, reject) => w.once('exit', resolve).once('error', reject))))
      assert.deepEqual([...numbers], [0, 150])
      await session.close()
    })
  }

  it('row 33: one that ends by itself or by process.exit lets its lock go, and the others live on', async () => {
    const session = await connect(etcd)
    for (const end of ['', 'process.exit(3)']) {
      const name = freshName()
      const w = worker(`const s = await connect(); globalThis.hold = await s.mutex(workerData).lock(); ${end}`, name)
      const code = await new Promise((resolve, reject) => w.once('exit', resolve).once('error', reject))
      assert.equal(code, end ? 3 : 0)
      await keysAreGone(name)
    }
    await (await session.mutex(freshName()).lock()).unlock()
    await session.close()
  })

  it('row 33: that alone have loaded the library do not take it away under its threads', async () => {
    const ended = await run(`
      const { Worker } = require('node:worker_threads')
      for (let n = 0; n < 10; n++) {
        const w = new Worker(\`
          const { connect } = require(${JSON.stringify(JSON.stringify(entry)).slice(1, -1)})
          connect().then((s) => s.mutex('${freshName()}').lock()).then((hold) => { globalThis.hold = hold; require('node:worker_threads').parentPort.postMessage('') })
          setInterval(() => {}, 1000)\`, { eval: true })
        await new Promise((resume) => w.once('message', resume))
        await w.terminate()
      }
      say('done')`)
    assert.deepEqual(ended, clean('done\n'))
  })

  it('row 29: the main thread ends while workers hold and wait', async () => {
    const name = freshName()
    const ended = await run(`
      const { Worker } = require('node:worker_threads')
      const source = \`
        const { connect } = require(${JSON.stringify(JSON.stringify(entry)).slice(1, -1)})
        connect().then((s) => { s.mutex('${name}').lock().then((hold) => { globalThis.hold = hold }); require('node:worker_threads').parentPort.postMessage('') })
        setInterval(() => {}, 1000)\`
      await (await connect()).mutex('${name}').lock()
      await Promise.all([1, 2, 3].map(() => new Promise((resume) => new Worker(source, { eval: true }).once('message', resume))))
      process.exit(4)`)
    assert.deepEqual(ended, { code: 4, signal: null, stdout: '', stderr: '' })
    await keysAreGone(name)
  })
})

describe('the garbage collector', () => {
  // The function that is run keeps no reference behind.
  const forgetful = `
    const warnings = []
    process.on('warning', (warning) => warnings.push(warning))
    const collect = async (enough) => {
      const end = performance.now() + 20000
      while (!(await enough())) {
        if (performance.now() > end) { say('not collected'); process.exit(1) }
        gc()
        await new Promise((resume) => setTimeout(resume, 5))
      }
    }`

  for (const [store, target] of stores) {
    it(`row 31: a forgotten hold is released, with one warning and an aborted signal (${store})`, async () => {
      const name = freshName()
      const ended = await run(
        `${forgetful}
        const session = await connect('${target}')
        let signal
        await (async () => { signal = (await session.mutex('${name}').lock()).signal })()
        const next = session.mutex('${name}').lock()
        let held = false
        next.then(() => { held = true })
        await collect(() => held)
        say(signal.aborted + ' ' + signal.reason.code)
        await (await next).unlock()
        say(warnings.length + ' ' + warnings[0].name + ' ' + warnings[0].code + ' ' + warnings[0].message.includes('${name}'))`,
        { flags: ['--no-warnings'] },
      )
      assert.deepEqual(ended, clean('true ETCDLOCK_LOST\n1 EtcdLockWarning ETCDLOCK_FORGOTTEN_HOLD true\n'))
    })

    it(`row 31: a forgotten wait is released when it is granted (${store})`, async () => {
      const name = freshName()
      const ended = await run(
        `${forgetful}
        const session = await connect('${target}')
        const first = await session.mutex('${name}').lock()
        ;(() => { session.mutex('${name}').lock() })()
        gc()
        await first.unlock()
        let free = null
        await collect(async () => (free = await session.mutex('${name}').tryLock()))
        await free.unlock()
        say(warnings.map((warning) => warning.code).join())`,
        { flags: ['--no-warnings'] },
      )
      assert.deepEqual(ended, clean('ETCDLOCK_FORGOTTEN_HOLD\n'))
    })
  }

  it('row 31: also in a worker', async () => {
    const name = freshName()
    const source = `
      const { connect } = require(${JSON.stringify(entry)})
      const { parentPort } = require('node:worker_threads')
      process.on('warning', (warning) => parentPort.postMessage(warning.code))
      ;(async () => {
        const session = await connect()
        await (async () => { await session.mutex('${name}').lock() })()
        const again = setInterval(gc, 5)
        const next = await session.mutex('${name}').lock()
        await next.unlock()
        clearInterval(again)
      })()`
    const w = new Worker(source, { eval: true, stderr: true })
    const messages = []
    w.on('message', (code) => messages.push(code))
    assert.equal(await new Promise((resolve, reject) => w.once('exit', resolve).once('error', reject)), 0)
    assert.deepEqual(messages, ['ETCDLOCK_FORGOTTEN_HOLD'])
  })

  it('row 31: leaves holds alone that were unlocked, lost, or that a living mutex keeps', async () => {
    const ended = await run(`${forgetful}
      const session = await connect()
      const kept = session.mutex('${freshName()}')
      await (async () => {
        await kept.lock()
        await (await session.mutex('${freshName()}').lock()).unlock()
        await session.mutex('${freshName()}').withLock(() => {})
        const doomed = await connect()
        await doomed.mutex('${freshName()}').lock()
        await doomed.close()
      })()
      let collected = 0
      const registry = new FinalizationRegistry(() => collected++)
      for (let n = 0; n < 20; n++) { (() => registry.register({}, 0))(); await collect(() => collected > n) }
      say(kept.isHeld() + ' ' + warnings.length)
      await kept.unlock()`)
    assert.deepEqual(ended, clean('true 0\n'))
  })

  it('gets all that belonged to a released hold', async () => {
    const ended = await run(`${forgetful}
      const session = await connect()
      const mutex = session.mutex('${freshName()}')
      let left = 50
      const registry = new FinalizationRegistry(() => left--)
      for (let n = left; n > 0; n--) await mutex.withLock((hold) => { registry.register(hold.signal, 0) })
      await collect(() => left <= 1) // the mutex keeps its latest hold
      say('collected')`)
    assert.deepEqual(ended, clean('collected\n'))
  })

  it('closes a session that was forgotten', async () => {
    const ended = await run(`${forgetful}
      const lease = await (async () => (await connect()).leaseId)()
      const watching = await connect()
      const { execFileSync } = require('node:child_process')
      const leases = () => execFileSync('etcdctl', ['--endpoints', process.env.ETCDLOCK_ENDPOINTS, 'lease', 'list'], { env: { ...process.env, ETCDCTL_API: '3' } }).toString()
      await collect(() => !leases().includes(lease.toString(16)))
      say('closed ' + warnings.length)`)
    assert.deepEqual(ended, clean('closed 0\n'))
  })

  it('does not close the session of a hold that is all that is left', async () => {
    const ended = await run(`${forgetful}
      const hold = await (async () => (await connect()).mutex('${freshName()}').lock())()
      let collected = 0
      const registry = new FinalizationRegistry(() => collected++)
      for (let n = 0; n < 20; n++) { (() => registry.register({}, 0))(); await collect(() => collected > n) }
      say(String(hold.isHeld()))
      await hold.unlock()`)
    assert.deepEqual(ended, clean('true\n'))
  })
})

describe('unhandled rejections', () => {
  it('never come from the library itself', async () => {
    // Everything that can fail behind the user's back does, under --unhandled-rejections=strict.
    const ended = await run(`
      const session = await connect()
      const doomed = await connect(undefined, { maxHold: 20 })
      const name = '${freshName()}'
      const hold = await doomed.mutex(name).lock()
      const { signal } = hold
      const awake = setInterval(() => {}, 1000)
      await new Promise((resume) => signal.addEventListener('abort', resume))
      clearInterval(awake)
      await doomed.mutex(name + '2').withLock(async () => { await doomed.close(); throw new Error('mine') }).catch((error) => say(error.message))
      for (let n = 0; n < 50; n++) {
        const controller = new AbortController()
        const lock = session.mutex(name).lock({ signal: controller.signal }).catch(() => {})
        if (n % 2) await new Promise(setImmediate)
        controller.abort()
        await lock
      }
      const controller = new AbortController()
      const connecting = connect(undefined, { signal: controller.signal }).catch(() => {})
      controller.abort()
      await connecting
      const last = await session.mutex(name).lock()
      const waiting = session.mutex(name).lock().catch((error) => say(error.code))
      await session.close()
      await waiting
      await last.unlock().catch((error) => say(error.code))
      say('end')`)
    assert.deepEqual(ended, clean('mine\nETCDLOCK_CLOSED\nETCDLOCK_LOST\nend\n'))
  })
})
