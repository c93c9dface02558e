// etcdlock for Node as a peer of the benchmark: WHAT ENDPOINT NAME ROUNDS.
import { createInterface } from 'node:readline'
import { connect } from '../../bindings-node/index.mjs'

const [what, endpoint, name, rounds] = process.argv.slice(2)
const session = await connect(endpoint, { ttl: 10 })
const mutex = session.mutex(name)
const guard = what === 'put' ? await session.mutex(`${name}.guard`).lock() : undefined
const input = createInterface({ input: process.stdin })
console.log('ready')
await new Promise((go) => input.once('line', go))
const took = []
for (let n = 0; n < Number(rounds); n++) {
  const start = process.hrtime.bigint()
  if (guard) {
    await guard.put(name, 'x')
  } else {
    const hold = await mutex.lock()
    await hold.unlock()
  }
  took.push(process.hrtime.bigint() - start)
}
console.log(took.map((ns) => `enter 0 ${ns}`).join('\n'))
input.close()
await session.close()
