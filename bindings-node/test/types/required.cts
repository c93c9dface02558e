// The same types by require().

import etcdlock = require('../../index.js')

export async function usage(): Promise<bigint> {
  const session: etcdlock.Session = await etcdlock.connect('memory:')
  const hold: etcdlock.Hold | null = await session.mutex('x').tryLock()
  return hold?.token ?? 0n
}
