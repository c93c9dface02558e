// Compiled, never run: what must and what must not compile.

import type { Contender, ConnectOptions, EtcdLockErrorCode, LockOptions, Stats } from '../../index.mjs'
import etcdlock, { connect, EtcdLockError, Hold, Mutex, Session, version } from '../../index.mjs'

/** Compiles only if the two types are the same. */
type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false
function same<A, B>(_: Same<A, B>): void {}

export async function usage(signal: AbortSignal): Promise<void> {
  const options: ConnectOptions = {
    ttl: 10,
    namespace: '/a',
    user: 'u',
    password: 'p',
    ca: 'ca.pem',
    cert: 'c.pem',
    key: 'k.pem',
    serverName: 's',
    owner: 'me',
    connectTimeout: 1000,
    maxHold: 60_000,
    signal,
  }
  await using session = await connect('127.0.0.1:2379', options)
  same<typeof session, Session>(true)
  await connect()
  await connect(['a:1', 'b:1'] as const, {})
  await connect(null)

  const mutex = session.mutex('/orders/42')
  same<typeof mutex, Mutex>(true)
  const lockOptions: LockOptions = { timeout: 5000, signal }
  await using hold = await mutex.lock(lockOptions)
  same<typeof hold, Hold>(true)
  same<typeof hold.token, bigint>(true)
  await fetch('http://localhost', { signal: hold.signal })
  const held: boolean = hold.isHeld() && mutex.isHeld() && !hold.released
  const left: number = hold.remaining() + mutex.remaining()
  same<ReturnType<typeof hold.check>, void>(true)
  await hold.put('key', 'value')
  await hold.put(new Uint8Array(1), Buffer.from('x'))
  const value = await hold.get('key')
  same<typeof value, Uint8Array | null>(true)
  await hold.delete('key')
  const { mutex: same1, name } = hold
  same<typeof same1, Mutex>(true)
  same<typeof name, string>(true)
  await hold.unlock()
  await mutex.unlock()
  same<typeof mutex.token, bigint | null>(true)

  const maybe = await mutex.tryLock({ signal })
  same<typeof maybe, Hold | null>(true)
  await maybe?.unlock()

  const fromAsync = await mutex.withLock(async (hold) => Number(hold.token), { timeout: 5000 })
  same<typeof fromAsync, number>(true)
  const fromSync = await mutex.withLock(() => 'x')
  same<typeof fromSync, string>(true)

  const contenders = await session.inspect('/orders/42')
  same<typeof contenders, Contender[]>(true)
  const ages: (number | undefined)[] = contenders.map((contender) => contender.age)
  const stats: Stats = session.stats()
  same<typeof session.leaseId, bigint | null>(true)
  await session.close({ timeout: 1000 })

  try {
    await mutex.lock()
  } catch (error) {
    if (error instanceof EtcdLockError) {
      same<typeof error.code, EtcdLockErrorCode>(true)
      switch (error.code) {
        case 'ETCDLOCK_TIMEOUT':
          break
        // @ts-expect-error no such code
        case 'ETCDLOCK_TIMED_OUT':
      }
    }
  }
  void [held, left, ages, stats, version, etcdlock.connect]

  // @ts-expect-error milliseconds are a number
  await mutex.lock({ timeout: '5s' })
  // @ts-expect-error no such option
  await mutex.lock({ timeuot: 5 })
  // @ts-expect-error no such option of a try
  await mutex.tryLock({ timeout: 5 })
  // @ts-expect-error a maybe is not a hold
  maybe.unlock()
  // @ts-expect-error connect() makes sessions
  new Session()
  // @ts-expect-error mutex() makes mutexes
  new Mutex()
  // @ts-expect-error lock() makes holds
  new Hold()
  // @ts-expect-error the token is for reading
  hold.token = 1n
  // @ts-expect-error a name is a string
  session.mutex(42)
  // @ts-expect-error a value is text or bytes
  await hold.put('key', 42)
}
