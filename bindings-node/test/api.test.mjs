// All of the API, on etcd and in memory.

import assert from 'node:assert/strict'
import { getEventListeners } from 'node:events'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { after, before, describe, it } from 'node:test'
import { inspect } from 'node:util'
import { runInNewContext } from 'node:vm'
import * as etcdlock from '../index.mjs'
import { etcdctl, freshName, keysAreGone, keysOf, lost, start, stores, tick, until } from './support.mjs'

const { connect, EtcdLockError, Hold, Mutex, Session } = etcdlock
const code = (name) => (error) => {
  assert.ok(error instanceof EtcdLockError, `${error}`)
  assert.equal(error.code, `ETCDLOCK_${name}`)
  return true
}

const warnings = []
process.on('warning', (warning) => warnings.push(warning))

for (const [store, target] of stores) {
  describe(store, () => {
    let session
    before(async () => {
      session = await connect(target, { ttl: 5 })
    })
    after(() => session.close())

    it('refuses names that would become the same on the way, and shows what it is', async () => {
      assert.throws(() => session.mutex('a\ud800'), (error) => code('INVALID')(error) && /"a\\ud800" is not well-formed/.test(error.message))
      const mutex = session.mutex('a😀')
      const hold = await mutex.lock()
      assert.equal(inspect(hold), `Hold { name: "a😀", token: ${hold.token}, held: true }`)
      assert.equal(inspect(mutex), 'Mutex { name: "a😀", held: true }')
      assert.equal(inspect(session), `Session { lease: ${session.leaseId}, ttl: ${session.ttl} }`)
      await hold.unlock()
    })

    it('row 54: takes bytes of another realm, and any number of listeners to a signal of its own', async () => {
      const hold = await session.mutex(freshName()).lock()
      const key = `${freshName()}/state`
      await hold.put(key, runInNewContext('Uint8Array.of(112, 97, 105, 100)'))
      assert.equal((await hold.get(key)).toString(), 'paid')
      for (let n = 0; n < 20; n++) hold.signal.addEventListener('abort', () => {})
      await tick()
      assert.deepEqual(warnings.filter((warning) => warning.name === 'MaxListenersExceededWarning'), [])
      await hold.unlock()
    })

    describe('lock', () => {
      it('gives a hold with a token that rises, until it is unlocked', async () => {
        const mutex = session.mutex(freshName())
        assert.equal(mutex.isHeld(), false)
        assert.equal(mutex.token, null)
        assert.equal(mutex.remaining(), 0)
        const first = await mutex.lock()
        assert.ok(first instanceof Hold)
        assert.equal(typeof first.token, 'bigint')
        assert.ok(first.isHeld() && mutex.isHeld())
        assert.ok(first.remaining() > 0 && first.remaining() <= 5000)
        assert.equal(mutex.token, first.token)
        assert.equal(first.name, mutex.name)
        assert.equal(first.mutex, mutex)
        first.check()
        await first.unlock()
        assert.equal(first.isHeld(), false)
        assert.equal(first.remaining(), 0)
        assert.throws(() => first.check(), code('NOT_HELD'))
        assert.equal(mutex.token, null)
        const second = await mutex.lock()
        assert.ok(second.token > first.token)
        await mutex.unlock()
        assert.equal(second.isHeld(), false)
        assert.equal(second.released, true)
      })

      it('lets one in at a time, in the order they came', async () => {
        const name = freshName()
        const other = await connect(target, { ttl: 5 })
        const mutexes = [session.mutex(name), session.mutex(name), other.mutex(name)]
        let inside = 0
        let last = 0n
        const order = []
        await Promise.all(
          Array.from({ length: 60 }, async (_, n) => {
            await mutexes[n % 3].withLock(async (hold) => {
              assert.equal(++inside, 1)
              assert.ok(hold.token > last)
              last = hold.token
              order.push(n)
              await tick()
              inside--
            })
          }),
        )
        const ofFirst = order.filter((n) => n % 3 === 0)
        assert.deepEqual(ofFirst, [...ofFirst].sort((a, b) => a - b))
        assert.equal(order.length, 60)
        await other.close()
      })

      it('rejects with TIMEOUT in time and leaves nothing', async () => {
        const name = freshName()
        const hold = await session.mutex(name).lock()
        const other = await connect(target, { ttl: 5 })
        await assert.rejects(other.mutex(name).lock({ timeout: 30 }), code('TIMEOUT'))
        await assert.rejects(other.mutex(name).lock({ timeout: 0 }), code('TIMEOUT'))
        assert.equal((await session.inspect(name)).length, 1)
        await hold.unlock()
        await (await other.mutex(name).lock({ timeout: 0 })).unlock()
        await (await other.mutex(name).lock({ timeout: Infinity })).unlock()
        await (await other.mutex(name).lock({ timeout: null, signal: undefined })).unlock()
        await other.close()
      })

      it('has errors whose stack names the caller', async () => {
        const hold = await session.mutex(freshName()).lock()
        async function whoCalled() {
          await session.mutex(hold.name).lock({ timeout: 0 })
        }
        const error = await whoCalled().catch((error) => error)
        assert.match(error.stack, /whoCalled/)
        assert.match(error.stack, /^EtcdLockError: the lock/)
        assert.match(error.message, new RegExp(hold.name))
        await hold.unlock()
      })
    })

    describe('tryLock', () => {
      it('gives a hold, or null if the lock is taken', async () => {
        const name = freshName()
        const other = await connect(target)
        const hold = await session.mutex(name).tryLock()
        assert.ok(hold instanceof Hold && hold.isHeld())
        assert.equal(await session.mutex(name).tryLock(), null)
        assert.equal(await other.mutex(name).tryLock(), null)
        assert.equal((await session.inspect(name)).length, 1)
        await hold.unlock()
        await (await other.mutex(name).tryLock()).unlock()
        await other.close()
      })

      it('lets exactly one of many win', async () => {
        const mutex = session.mutex(freshName())
        const holds = await Promise.all(Array.from({ length: 64 }, () => mutex.tryLock()))
        assert.equal(holds.filter(Boolean).length, 1)
        assert.ok(mutex.isHeld(), 'the mutex knows the one that won')
        await mutex.unlock()
      })
    })

    describe('an AbortSignal', () => {
      it('ends the wait with its reason, and leaves nothing', async () => {
        const name = freshName()
        const hold = await session.mutex(name).lock()
        const other = await connect(target)
        const reason = new Error('enough')
        const controller = new AbortController()
        const waiting = other.mutex(name).lock({ signal: controller.signal })
        await tick()
        controller.abort(reason)
        await assert.rejects(waiting, (error) => error === reason)
        await assert.rejects(other.mutex(name).lock({ signal: controller.signal }), (error) => error === reason)
        await assert.rejects(other.mutex(name).tryLock({ signal: controller.signal }), (error) => error === reason)
        await assert.rejects(connect(target, { signal: controller.signal }), (error) => error === reason)
        await assert.rejects(other.mutex(name).lock({ signal: AbortSignal.timeout(20) }), { name: 'TimeoutError' })
        await assert.rejects(other.mutex(name).lock({ signal: AbortSignal.abort() }), { name: 'AbortError' })
        await hold.unlock()
        await (await session.mutex(name).lock({ timeout: 10_000 })).unlock()
        await other.close()
      })

      it('may be shared by any number of locks, and keeps its own handlers', async () => {
        const name = freshName()
        const hold = await session.mutex(name).lock()
        const controller = new AbortController()
        const { signal } = controller
        let heard = 0
        signal.onabort = () => heard++
        const onabort = signal.onabort
        const waiting = Array.from({ length: 100 }, () => session.mutex(name).lock({ signal }))
        await tick()
        assert.equal(signal.onabort, onabort)
        assert.equal(getEventListeners(signal, 'abort').length, 2, 'one for all of them, and the user’s own')
        controller.abort()
        const results = await Promise.allSettled(waiting)
        assert.ok(results.every(({ reason }) => reason === signal.reason))
        assert.equal(heard, 1)
        assert.equal(getEventListeners(signal, 'abort').length, 1)
        await hold.unlock()
        await tick()
        assert.deepEqual(warnings.filter((warning) => warning.name === 'MaxListenersExceededWarning'), [])
      })

      it('is let go of when the lock is there, and does nothing to it any more', async () => {
        const controller = new AbortController()
        const hold = await session.mutex(freshName()).lock({ signal: controller.signal })
        assert.equal(getEventListeners(controller.signal, 'abort').length, 0)
        controller.abort()
        await tick()
        assert.ok(hold.isHeld())
        await hold.unlock()
      })

      it('at every tick leaves either a lock that works or none at all', async () => {
        const name = freshName()
        const mutex = session.mutex(name)
        for (let ticks = 0; ticks < 40; ticks++) {
          const controller = new AbortController()
          const waiting = mutex.lock({ signal: controller.signal })
          for (let n = 0; n < ticks; n++) await (n % 2 ? tick() : null)
          controller.abort()
          const hold = await waiting.catch((error) => {
            assert.equal(error, controller.signal.reason)
          })
          await hold?.unlock()
          await (await mutex.lock({ timeout: 10_000 })).unlock()
        }
        if (store === 'etcd') await keysAreGone(name)
      })

      it('at the very moment of the grant leaves a hold or a free lock', async () => {
        const name = freshName()
        const [ours, theirs] = [session.mutex(name), session.mutex(name)]
        const other = await connect(target)
        const outcomes = { held: 0, rejected: 0 }
        for (let round = 0; round < 150; round++) {
          const mutex = round % 2 ? theirs : other.mutex(name)
          const held = await ours.lock({ timeout: 10_000 })
          const controller = new AbortController()
          const waiting = mutex.lock({ signal: controller.signal })
          for (let n = round % 5; n > 0; n--) await tick()
          const unlocked = held.unlock()
          for (let n = round % 7; n > 0; n--) await tick()
          if (round % 3 === 0) await unlocked
          controller.abort()
          const hold = await waiting.catch(() => null)
          outcomes[hold ? 'held' : 'rejected']++
          await unlocked
          await hold?.unlock()
        }
        assert.ok(outcomes.rejected > 0, JSON.stringify(outcomes))
        await (await ours.lock({ timeout: 10_000 })).unlock()
        if (store === 'etcd') await keysAreGone(name)
        await other.close()
      })
    })

    describe('a loss', () => {
      it('aborts hold.signal with the error, and every call says so', async () => {
        const doomed = await connect(target)
        const hold = await doomed.mutex(freshName()).lock()
        const { signal } = hold
        assert.equal(signal, hold.signal)
        assert.equal(signal.aborted, false)
        const aborted = lost(hold)
        await doomed.close()
        await aborted
        assert.ok(code('LOST')(signal.reason))
        assert.equal(hold.isHeld(), false)
        assert.throws(() => hold.check(), code('LOST'))
        await assert.rejects(hold.put('k', 'v'), code('LOST'))
        await assert.rejects(hold.unlock(), code('LOST'))
        await assert.rejects(hold.unlock(), code('NOT_HELD'))
      })

      it('shows in a signal that is first asked for afterwards', async () => {
        const doomed = await connect(target)
        const hold = await doomed.mutex(freshName()).lock()
        await doomed.close()
        assert.equal(hold.signal.aborted, true)
        assert.equal(hold.signal.reason.code, 'ETCDLOCK_LOST')
      })

      it('never comes after an unlock', async () => {
        const doomed = await connect(target)
        const mutex = doomed.mutex(freshName())
        const holds = [await mutex.lock()]
        holds[0].signal.onabort = () => assert.fail('aborted after unlock')
        await holds[0].unlock()
        await doomed.close()
        await tick()
        assert.equal(holds[0].signal.aborted, false)
      })

      it('comes with max_hold', async () => {
        const short = await connect(target, { maxHold: 50 })
        const hold = await short.mutex(freshName()).lock()
        await lost(hold)
        assert.match(hold.signal.reason.message, /max_hold/)
        await short.close()
      })

      if (store === 'etcd') {
        it('of the key is noticed at once, with the reason', async () => {
          const hold = await session.mutex(freshName()).lock()
          const aborted = lost(hold)
          const [key] = await keysOf(hold.name)
          await etcdctl('del', key)
          await aborted
          assert.match(hold.signal.reason.message, /deleted from outside/)
          await assert.rejects(hold.mutex.unlock(), code('LOST'))
        })

        it('of the lease does not end the session', async () => {
          const strong = await connect(target, { ttl: 5 })
          const mutex = strong.mutex(freshName())
          const hold = await mutex.lock()
          const aborted = lost(hold)
          const old = strong.leaseId
          await etcdctl('lease', 'revoke', old.toString(16))
          await aborted
          const next = await mutex.lock({ timeout: 10_000 })
          assert.ok(next.token > hold.token)
          assert.notEqual(strong.leaseId, old)
          assert.equal(strong.stats().leasesLost, 1)
          await assert.rejects(hold.unlock(), code('LOST'))
          assert.ok(next.isHeld(), 'the old hold’s unlock leaves the new one alone')
          await mutex.unlock()
          await strong.close()
        })
      }
    })

    describe('withLock', () => {
      it('gives back what the work gave, and unlocks', async () => {
        const mutex = session.mutex(freshName())
        assert.equal(await mutex.withLock((hold) => hold.isHeld()), true)
        assert.equal(mutex.isHeld(), false)
        await mutex.withLock((hold) => hold.unlock(), { timeout: 1000 })
      })

      it('passes the work’s error on, and unlocks', async () => {
        const mutex = session.mutex(freshName())
        const oops = new Error('oops')
        await assert.rejects(
          mutex.withLock(() => {
            throw oops
          }),
          (error) => error === oops,
        )
        assert.equal(mutex.isHeld(), false)
        assert.equal(await mutex.withLock(async () => 'again', { timeout: 0 }), 'again')
      })

      it('says LOST if the lock was lost, unless the work has an error of its own', async () => {
        const oops = new Error('oops')
        for (const [fails, expected] of [
          [false, code('LOST')],
          [true, (error) => error === oops],
        ]) {
          const doomed = await connect(target)
          const working = doomed.mutex(freshName()).withLock(async () => {
            await doomed.close()
            if (fails) throw oops
          })
          await assert.rejects(working, expected)
        }
      })

      it('does not run the work without the lock', async () => {
        const hold = await session.mutex(freshName()).lock()
        const work = () => assert.fail('it ran')
        await assert.rejects(hold.mutex.withLock(work, { timeout: 10 }), code('TIMEOUT'))
        await assert.rejects(hold.mutex.withLock('work'), code('INVALID'))
        await hold.unlock()
      })
    })

    describe('disposal', () => {
      const asyncDispose = Symbol.asyncDispose ?? Symbol.for('Symbol.asyncDispose')

      it('unlocks and closes, and does nothing the second time', async () => {
        const own = await connect(target)
        const hold = await own.mutex(freshName()).lock()
        await hold[asyncDispose]()
        assert.equal(hold.isHeld(), false)
        await hold[asyncDispose]()
        await own[asyncDispose]()
        await own[asyncDispose]()
        assert.throws(() => own.mutex('x'), code('CLOSED'))
      })

      it('says LOST if the hold was lost', async () => {
        const own = await connect(target)
        const hold = await own.mutex(freshName()).lock()
        await own.close()
        await assert.rejects(hold[asyncDispose](), code('LOST'))
      })
    })

    describe('guarded requests', () => {
      it('write, read and delete while the hold owns the lock', async () => {
        const hold = await session.mutex(freshName()).lock()
        const key = `${hold.name}.state`
        assert.equal(await hold.get(key), null)
        await hold.put(key, 'größe')
        assert.equal(Buffer.from(await hold.get(key)).toString(), 'größe')
        await hold.put(Buffer.from(key), new Uint8Array([0, 255]))
        assert.deepEqual([...(await hold.get(key))], [0, 255])
        await hold.delete(key)
        await hold.delete(key)
        assert.equal(await hold.get(key), null)
        await assert.rejects(hold.put('', 'x'), code('INVALID'))
        await assert.rejects(hold.put(key, '\udc00'), code('INVALID'))
        await assert.rejects(hold.put(key, 5), code('INVALID'))
        await hold.unlock()
        await assert.rejects(hold.put(key, 'x'), code('NOT_HELD'))
      })
    })

    describe('a session', () => {
      it('shows the holder', async () => {
        const own = await connect(target, { owner: 'first' })
        const hold = await own.mutex(freshName()).lock()
        const [holder, ...waiters] = await session.inspect(hold.name)
        const { age, key, host, ...rest } = holder
        assert.deepEqual(rest, { isHolder: true, owner: 'first', token: hold.token, pid: process.pid, language: 'node' })
        assert.ok(age >= 0 && host)
        assert.ok(key.startsWith(`${hold.name}/`))
        assert.deepEqual(waiters, [])
        await own.close()
        assert.deepEqual(await session.inspect(hold.name), [])
      })

      if (store === 'etcd') {
        it('shows the waiters of other processes', async () => {
          const hold = await session.mutex(freshName()).lock()
          const name = hold.name
          const waiter = start(`
            const session = await connect(undefined, { owner: 'second' })
            await session.mutex('${name}').withLock((hold) => say('token ' + hold.token))`)
          const seen = await until('a waiter', async () => {
            const all = await session.inspect(name)
            return all.length === 2 && all
          })
          assert.equal(seen[0].token, hold.token)
          assert.equal(seen[1].isHolder, false)
          assert.equal(seen[1].owner, 'second')
          assert.equal(seen[1].pid, waiter.child.pid)
          await hold.unlock()
          assert.deepEqual(await waiter.ended(), { code: 0, signal: null, stdout: `token ${seen[1].token}\n`, stderr: '' })
        })
      }

      it('has the TTL that was granted, a lease and counters', async () => {
        const own = await connect(target, { ttl: 2.5 })
        assert.equal(own.ttl, 3)
        assert.equal(typeof own.leaseId, 'bigint')
        await own.mutex(freshName()).withLock(() => {})
        const stats = own.stats()
        assert.equal(stats.locks, 1)
        assert.equal(stats.holdsLost, 0)
        assert.ok(stats.requests > 0)
        await own.close()
        assert.equal(own.leaseId, null)
      })

      it('puts its namespace before names', async () => {
        const own = await connect(target, { namespace: '/blue' })
        const mutex = own.mutex(freshName())
        assert.ok(mutex.name.startsWith('/blue/node/'))
        const hold = await mutex.lock()
        assert.equal(await session.mutex(mutex.name).tryLock(), null)
        await hold.unlock()
        await own.close()
      })

      it('once closed says CLOSED, to waiters too', async () => {
        const own = await connect(target)
        const mutex = own.mutex(freshName())
        const hold = await session.mutex(mutex.name).lock()
        const waiting = mutex.lock()
        await Promise.all([assert.rejects(waiting, code('CLOSED')), own.close({ timeout: 5000 })])
        await assert.rejects(mutex.lock(), code('CLOSED'))
        await assert.rejects(mutex.tryLock(), code('CLOSED'))
        await assert.rejects(own.inspect(mutex.name), code('CLOSED'))
        assert.throws(() => own.mutex('x'), code('CLOSED'))
        await own.close()
        await hold.unlock()
      })

      it('says NOT_HELD where there is nothing to unlock', async () => {
        const mutex = session.mutex(freshName())
        await assert.rejects(mutex.unlock(), code('NOT_HELD'))
        const hold = await mutex.lock()
        await hold.unlock()
        await assert.rejects(hold.unlock(), code('NOT_HELD'))
        await assert.rejects(mutex.unlock(), code('NOT_HELD'))
      })
    })

    it('refuses bad arguments with value and rule', async () => {
      const mutex = session.mutex(freshName())
      const cases = [
        [() => mutex.lock({ timeout: -1 }), /timeout -1 .*milliseconds/],
        [() => mutex.lock({ timeout: NaN }), /timeout NaN/],
        [() => mutex.lock({ timeout: '5' }), /timeout "5"/],
        [() => mutex.lock({ timeuot: 5 }), /"timeuot" is not known; there are timeout, signal/],
        [() => mutex.lock(5), /the options 5/],
        [() => mutex.lock({ signal: {} }), /not an AbortSignal/],
        [() => connect(target, { ttl: 1 }), /ttl 1s is too short/],
        [() => connect(target, { ttl: '10' }), /ttl "10" is not a number of seconds/],
        [() => connect(target, { user: 'u' }), /without a password/],
        // Of a secret not even what was wrong with it is shown.
        [() => connect(target, { user: 'u', password: ['hunter2'] }), /^password is not a string \(its value is not shown\)$/],
        [() => connect(target, { user: 'u', password: 'hunter2\ud800' }), /^password is not well-formed \(its value is not shown\)$/],
        [() => connect(target, { cert: 'c', key: { pem: 'hunter2' } }), /^key is not a string \(its value is not shown\)$/],
        [() => connect(target, { owner: Symbol('x') }), /owner Symbol\(x\)/],
        [() => connect('redis://a'), /unknown scheme "redis"/],
        [() => connect([]), /empty/],
        [() => connect(5), /target 5/],
        [() => connect(['a:1', null]), /target null/],
        [async () => session.mutex(''), /empty/],
        [async () => session.mutex('a\0b'), /NUL/],
        [async () => session.mutex('x'.repeat(1025)), /1025 bytes/],
        [async () => session.mutex(Object.create(null)), /lock name \[object Object\]/],
        [() => session.inspect(7), /lock name 7/],
        [() => session.close({ timeout: -5 }), /timeout -5/],
      ]
      for (const [start, message] of cases) {
        await assert.rejects(start, (error) => code('INVALID')(error) && assert.match(error.message, message) === undefined)
      }
    })
  })
}

describe('the package', () => {
  const require = createRequire(import.meta.url)

  it('is the same by import and by require', () => {
    const required = require('../index.js')
    assert.deepEqual(Object.keys(required).sort(), Object.keys(etcdlock).filter((name) => name !== 'default').sort())
    for (const name of Object.keys(required)) assert.equal(required[name], etcdlock[name])
    assert.equal(etcdlock.default, required)
  })

  it('has one version', () => {
    const cargo = readFileSync(new URL('../../Cargo.toml', import.meta.url), 'utf8')
    const [, version] = /^version = "(.*)"$/m.exec(cargo)
    assert.equal(etcdlock.version, version)
    assert.equal(require('../package.json').version, version)
    assert.equal(require('../npm/linux-x64-gnu/package.json').version, version)
    assert.equal(require('../package-lock.json').version, version)
  })

  it('makes sessions, mutexes and holds itself', () => {
    for (const kind of [Session, Mutex, Hold]) assert.throws(() => new kind(), TypeError)
  })

  it('says where and why it cannot connect, in time', async () => {
    const start = performance.now()
    await assert.rejects(connect('127.0.0.1:1', { connectTimeout: 300 }), (error) => code('UNAVAILABLE')(error) && /127\.0\.0\.1:1/.test(error.message))
    assert.ok(performance.now() - start < 10_000)
    await assert.rejects(connect('127.0.0.1:1', { signal: AbortSignal.timeout(50) }), { name: 'TimeoutError' })
  })

  it('has types and a doc comment for everything it has', () => {
    const types = readFileSync(new URL('../index.d.ts', import.meta.url), 'utf8')
    for (const kind of [Session, Mutex, Hold]) {
      const [, body] = new RegExp(`\\*/\nexport class ${kind.name} .*?\\{\n(.*?)\n\\}\n`, 's').exec(types)
      for (const key of Reflect.ownKeys(kind.prototype)) {
        if (key === 'constructor' || key === inspect.custom) continue
        const name = typeof key === 'symbol' ? '\\[Symbol.asyncDispose\\]' : key
        assert.match(body, new RegExp(`\\*/\n  (readonly )?${name}[(<:]`), `${kind.name}.${String(key)}`)
      }
    }
    for (const name of Object.keys(etcdlock)) if (name !== 'default') assert.match(types, new RegExp(`\\*/\nexport (class|function|const) ${name}\\b`))
  })

  it('names its errors', () => {
    const error = new EtcdLockError('ETCDLOCK_BUSY', 'x', { cause: 1 })
    assert.equal(error.name, 'EtcdLockError')
    assert.equal(String(error), 'EtcdLockError: x')
    assert.equal(error.cause, 1)
  })
})
