// The same classes for `import` as for require(), so that instanceof works across both.
import etcdlock from './index.js'

export const { connect, Session, Mutex, Hold, EtcdLockError, version } = etcdlock
export default etcdlock
