// Makes the npm packages: pack.mjs FOLDER. The main one is JavaScript; the native part is a package of
// its own for each platform, which npm installs where it fits (the layout of napi-rs).

import { execFileSync } from 'node:child_process'
import { copyFileSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'

const here = fileURLToPath(new URL('.', import.meta.url))
const folder = resolve(process.argv[2])
const platform = 'linux-x64-gnu'
const addon = `etcdlock.${platform}.node`
const { version } = JSON.parse(readFileSync(join(here, 'package.json'), 'utf8'))

const stage = mkdtempSync(join(tmpdir(), 'etcdlock-pack-'))
try {
  const native = join(stage, platform)
  const main = join(stage, 'etcdlock')
  const licenses = ['LICENSE-MIT', 'LICENSE-APACHE']
  for (const to of [native, main]) {
    mkdirSync(to)
    for (const license of licenses) copyFileSync(join(here, '..', license), join(to, license))
  }

  const manifest = JSON.parse(readFileSync(join(here, 'npm', platform, 'package.json'), 'utf8'))
  writeFileSync(join(native, 'package.json'), JSON.stringify({ ...manifest, version, files: [...manifest.files, ...licenses] }, null, 2))
  writeFileSync(join(native, 'README.md'), `# ${manifest.name}\n\n${manifest.description}. Install the package \`etcdlock\`.\n`)
  execFileSync('strip', ['--strip-unneeded', '-o', join(native, addon), join(here, addon)])

  const { devDependencies, scripts, ...published } = JSON.parse(readFileSync(join(here, 'package.json'), 'utf8'))
  for (const file of [...published.files, 'README.md']) copyFileSync(join(here, file), join(main, file))
  published.files.push(...licenses)
  published.optionalDependencies = { [manifest.name]: version }
  writeFileSync(join(main, 'package.json'), JSON.stringify(published, null, 2))

  mkdirSync(folder, { recursive: true })
  for (const old of readdirSync(folder)) if (old.endsWith('.tgz')) rmSync(join(folder, old))
  for (const from of [native, main]) {
    const made = execFileSync('npm', ['pack', '--json', '--ignore-scripts', '--loglevel=error', '--pack-destination', folder], { cwd: from })
    const [{ filename, size, files }] = JSON.parse(made)
    console.log(`${filename}  ${size} bytes`)
    for (const { path, size } of files) console.log(`    ${path}  ${size}`)
  }
} finally {
  rmSync(stage, { recursive: true, force: true })
}
