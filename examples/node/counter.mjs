// Adds to a number in a file, together with any other programs, one at a time.
//
//     node counter.mjs TARGET FILE ROUNDS lock|nolock

import { readFile, writeFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { connect } from 'etcdlock'

const [target, file, rounds, how] = process.argv.slice(2)
if (how !== 'lock' && how !== 'nolock') {
  console.error('usage: counter TARGET FILE ROUNDS lock|nolock')
  process.exit(64)
}

async function addOne() {
  const value = Number(await readFile(file, 'utf8').catch(() => '0')) + 1
  await sleep(1) // somebody else may come between: this is Node's shortest sleep
  // In place and always ten digits: one step, so that a reader never finds half a number.
  await writeFile(file, String(value).padStart(10, '0'), { flag: 'r+' })
  return value
}

const session = await connect(target, { ttl: 10 })
const mutex = session.mutex('/demo/counter')

for (let round = 0; round < Number(rounds); round++) {
  if (how === 'nolock') {
    console.log(`token=- value=${await addOne()} waited_us=0`)
    continue
  }
  const start = performance.now()
  await mutex.withLock(async (hold) => {
    const waited = Math.round((performance.now() - start) * 1000)
    console.log(`token=${hold.token} value=${await addOne()} waited_us=${waited}`)
  })
}

await session.close()
