// etcd3 for Node as a peer of the benchmark: FOLDER WHAT ENDPOINT NAME ROUNDS.
const { createInterface } = require('node:readline')
const [folder, what, endpoint, name, rounds] = process.argv.slice(2)
const { Etcd3 } = require(`${folder}/node_modules/etcd3`)

async function main() {
  const client = new Etcd3({ hosts: `http://${endpoint}` })
  await client.get(name)
  const input = createInterface({ input: process.stdin })
  console.log('ready')
  await new Promise((go) => input.once('line', go))
  const took = []
  for (let n = 0; n < Number(rounds); n++) {
    const start = process.hrtime.bigint()
    if (what === 'put') {
      await client.put(name).value('x')
    } else {
      const lock = client.lock(name).ttl(10)
      await lock.acquire()
      await lock.release()
    }
    took.push(process.hrtime.bigint() - start)
  }
  console.log(took.map((ns) => `enter 0 ${ns}`).join('\n'))
  process.exit(0)
}

main().catch((error) => {
  console.error(error.message)
  process.exit(1)
})
