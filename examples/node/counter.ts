// The same as counter.mjs, in TypeScript and with `await using`.
//
//     tsc --strict --target es2022 --module nodenext counter.ts && node counter.js TARGET FILE ROUNDS lock|nolock

import { readFile, writeFile } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { connect, type Hold } from 'etcdlock'

async function addOne(file: string): Promise<number> {
  const value = Number(await readFile(file, 'utf8').catch(() => '0')) + 1
  await sleep(1) // somebody else may come between: this is Node's shortest sleep
  // In place and always ten digits: one step, so that a reader never finds half a number.
  await writeFile(file, String(value).padStart(10, '0'), { flag: 'r+' })
  return value
}

async function main(target: string, file: string, rounds: number, locks: boolean): Promise<void> {
  await using session = await connect(target, { ttl: 10 })
  const mutex = session.mutex('/demo/counter')

  for (let round = 0; round < rounds; round++) {
    const start = performance.now()
    await using hold: Hold | null = locks ? await mutex.lock() : null
    const waited = hold ? Math.round((performance.now() - start) * 1000) : 0
    console.log(`token=${hold?.token ?? '-'} value=${await addOne(file)} waited_us=${waited}`)
  }
}

const [target, file, rounds, how] = process.argv.slice(2)
if (!file || (how !== 'lock' && how !== 'nolock')) {
  console.error('usage: counter TARGET FILE ROUNDS lock|nolock')
  process.exit(64)
}
await main(target, file, Number(rounds), how === 'lock')
