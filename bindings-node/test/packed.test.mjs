// The packages as npm gives them to users: `make dist`, installed into an empty folder.

import assert from 'node:assert/strict'
import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { cp, mkdtemp, readFile, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { after, before, describe, it } from 'node:test'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { etcd } from './support.mjs'

const here = fileURLToPath(new URL('..', import.meta.url))
const dist = join(here, '../dist/npm')
const exec = promisify(execFile)

describe('the packed packages', () => {
  let folder
  let tarballs
  const npm = (...args) => exec('npm', [...args, '--offline', '--no-audit', '--no-fund', '--loglevel=error'], { cwd: folder })
  const node = (...args) => exec(process.execPath, args, { cwd: folder })

  before(async () => {
    folder = await mkdtemp(join(tmpdir(), 'etcdlock-packed-'))
    tarballs = (await readdir(dist)).filter((file) => file.endsWith('.tgz')).map((file) => join(dist, file))
    await npm('install', ...tarballs)
  })
  after(() => rm(folder, { recursive: true, force: true }))

  it('contain what they should, and nothing that runs at installation', async () => {
    assert.deepEqual((await readdir(join(folder, 'node_modules'))).filter((name) => !name.startsWith('.')).sort(), ['etcdlock', 'etcdlock-linux-x64-gnu'])
    const main = (await readdir(join(folder, 'node_modules/etcdlock'))).sort()
    assert.deepEqual(main, ['LICENSE-APACHE', 'LICENSE-MIT', 'README.md', 'command.js', 'index.d.mts', 'index.d.ts', 'index.js', 'index.mjs', 'native.js', 'package.json'])
    for (const name of ['etcdlock', 'etcdlock-linux-x64-gnu']) {
      const manifest = JSON.parse(await readFile(join(folder, 'node_modules', name, 'package.json'), 'utf8'))
      assert.equal(manifest.scripts, undefined)
      assert.equal(manifest.dependencies, undefined)
      assert.equal(manifest.engines.node, '>=18')
    }
  })

  it('work by import and by require, on etcd and in memory', async () => {
    const body = `
      ;(async () => {
        for (const target of ['memory:', '${etcd}']) {
          const session = await connect(target)
          console.log(await session.mutex('/packed').withLock((hold) => hold.isHeld()))
        }
      })()`
    await writeFile(join(folder, 'imported.mjs'), `import { connect } from 'etcdlock'${body}`)
    await writeFile(join(folder, 'required.cjs'), `const { connect } = require('etcdlock')${body}`)
    for (const file of ['imported.mjs', 'required.cjs']) {
      assert.deepEqual(await node(file), { stdout: 'true\ntrue\n', stderr: '' })
    }
  })

  it('run the examples, which compile under tsc --strict, and do not lose a count', async () => {
    await cp(join(here, '../examples/node/counter.mjs'), join(folder, 'counter.mjs'))
    await cp(join(here, '../examples/node/counter.ts'), join(folder, 'counter-ts.mts'))
    await cp(join(here, 'node_modules/@types'), join(folder, 'types'), { recursive: true })
    await cp(join(here, 'node_modules/undici-types'), join(folder, 'node_modules/undici-types'), { recursive: true })
    await exec(join(here, 'node_modules/.bin/tsc'), ['--strict', '--target', 'es2022', '--module', 'nodenext', '--typeRoots', 'types', '--types', 'node', 'counter-ts.mts'], { cwd: folder })
    const file = join(folder, 'count')
    await writeFile(file, '0\n')
    const runs = await Promise.all(['counter.mjs', 'counter-ts.mjs'].map((program) => node(program, etcd, file, '25', 'lock')))
    assert.equal(Number(await readFile(file, 'utf8')), 50)
    const rows = runs.flatMap(({ stdout }) => stdout.trim().split('\n')).map((line) => /^token=(\d+) value=(\d+) waited_us=\d+$/.exec(line))
    assert.ok(rows.every(Boolean))
    rows.sort((a, b) => a[2] - b[2])
    assert.deepEqual(rows.map((row) => Number(row[2])), Array.from({ length: 50 }, (_, n) => n + 1))
    for (let n = 1; n < rows.length; n++) assert.ok(BigInt(rows[n][1]) > BigInt(rows[n - 1][1]), 'tokens rise with the values')
    const { stdout } = await node('counter.mjs', etcd, file, '1', 'nolock')
    assert.equal(stdout, 'token=- value=51 waited_us=0\n')
  })

  it('bring the command, which passes on its exit code and its signals', async () => {
    const command = join(folder, 'node_modules/.bin/etcdlock')
    const env = { ...process.env, ETCDLOCK_ENDPOINTS: etcd }
    const { stdout } = await exec(command, ['run', 'npx', '--', 'sh', '-c', 'echo $ETCDLOCK_NAME'], { env })
    assert.equal(stdout, 'npx\n')
    const failed = await exec(command, ['run', 'npx', '--', 'sh', '-c', 'exit 3'], { env }).catch((error) => error)
    assert.equal(failed.code, 3)
    for (const signal of ['SIGTERM', 'SIGINT', 'SIGUSR1']) {
      const script = `trap 'exit 9' ${signal.slice(3)}; echo ready; while :; do sleep 0.05; done`
      const running = spawn(command, ['run', 'npx', '--', 'sh', '-c', script], { env })
      try {
        await once(running.stdout, 'data')
        running.kill(signal)
        assert.deepEqual(await once(running, 'exit'), [9, null])
      } finally {
        running.kill('SIGKILL')
      }
    }
  })

  it('say what is missing where there is no native part', async () => {
    const alone = await mkdtemp(join(tmpdir(), 'etcdlock-alone-'))
    await cp(join(folder, 'node_modules/etcdlock'), join(alone, 'node_modules/etcdlock'), { recursive: true })
    const failed = await exec(process.execPath, ['-e', `require('etcdlock')`], { cwd: alone }).catch((error) => error)
    await rm(alone, { recursive: true })
    assert.match(failed.stderr, /no native part for linux x64 .*optional package etcdlock-linux-x64-gnu/)
  })
})
