package io.github.etcdlock

import io.github.etcdlock.Outside.ETCD
import io.github.etcdlock.Outside.freshName
import io.github.etcdlock.Outside.keys
import java.time.Duration
import java.util.concurrent.atomic.AtomicInteger
import kotlin.random.Random
import kotlin.test.assertFailsWith
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CompletableDeferred
import kotlinx.coroutines.CoroutineStart
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.async
import kotlinx.coroutines.awaitCancellation
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.coroutineScope
import kotlinx.coroutines.delay
import kotlinx.coroutines.joinAll
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking
import kotlinx.coroutines.withTimeout
import kotlinx.coroutines.withTimeoutOrNull
import kotlinx.coroutines.yield
import org.junit.jupiter.api.Assertions.assertEquals
import org.junit.jupiter.api.Assertions.assertFalse
import org.junit.jupiter.api.Assertions.assertNull
import org.junit.jupiter.api.Assertions.assertTrue
import org.junit.jupiter.api.Test
import org.junit.jupiter.api.Timeout
import org.junit.jupiter.params.ParameterizedTest
import org.junit.jupiter.params.provider.MethodSource

@Timeout(120)
class CoroutinesTest {
    private fun onSession(target: String, test: suspend (Session) -> Unit) =
        runBlocking { Session.awaitConnect(target).use { test(it) } }

    private suspend fun nothingIsLeft(session: Session, name: String) =
        withTimeout(30_000) { while (session.awaitInspect(name).isNotEmpty()) delay(5) }

    @ParameterizedTest
    @MethodSource("io.github.etcdlock.Outside#targets")
    fun `every call has a form that suspends`(target: String) = onSession(target) { session ->
        val name = freshName()
        val mutex = session.mutex(name)
        val hold = mutex.awaitLock()
        assertNull(session.mutex(name).awaitTryLock())
        assertFailsWith<LockTimeoutException> { mutex.awaitLock(Duration.ofMillis(20)) }
        assertEquals(hold.token, session.awaitInspect(name).single().token)
        hold.awaitPut("$name.state", "paid")
        assertEquals("paid", hold.awaitGet("$name.state"))
        hold.awaitDelete("$name.state".toByteArray())
        assertNull(hold.awaitGet("$name.state"))
        hold.awaitUnlock()
        assertFailsWith<NotHeldException> { mutex.awaitUnlock() }
        assertTrue(mutex.awaitTryLock()!!.isHeld())
        mutex.awaitUnlock()
        mutex.lock().use { assertTrue(it.isHeld()) }
        nothingIsLeft(session, name)
        session.awaitClose()
        assertFailsWith<ClosedException> { session.mutex(name) }
    }

    @ParameterizedTest
    @MethodSource("io.github.etcdlock.Outside#targets")
    fun `cancelling a coroutine ends its wait and leaves nothing`(target: String) = onSession(target) { session ->
        val name = freshName()
        val mutex = session.mutex(name)
        val hold = mutex.awaitLock()
        coroutineScope {
            val waiting = launch(start = CoroutineStart.UNDISPATCHED) { mutex.awaitLock() }
            waiting.cancelAndJoin()
            assertNull(withTimeoutOrNull(20) { mutex.awaitLock() })
        }
        hold.awaitUnlock()
        nothingIsLeft(session, name)
    }

    @ParameterizedTest
    @MethodSource("io.github.etcdlock.Outside#targets")
    fun `cancelling at the moment of the grant leaves nothing`(target: String) = onSession(target) { session ->
        val name = freshName()
        val mutex = session.mutex(name)
        var got = 0
        repeat(300) {
            coroutineScope {
                val waiting = launch(Dispatchers.Default) {
                    mutex.awaitLock().awaitUnlock()
                    got++
                }
                val end = System.nanoTime() + Random.nextLong(if (target == ETCD) 8_000_000 else 1_500_000)
                while (System.nanoTime() < end) yield()
                waiting.cancelAndJoin()
            }
        }
        println("$target: $got of 300 were faster than their cancellation")
        mutex.awaitLock(Duration.ofSeconds(30)).awaitUnlock()
        nothingIsLeft(session, name)
    }

    @ParameterizedTest
    @MethodSource("io.github.etcdlock.Outside#targets")
    fun `coroutines exclude each other`(target: String) = onSession(target) { session ->
        val mutex = session.mutex(freshName())
        val inside = AtomicInteger()
        val tokens = ArrayList<Long>()
        coroutineScope {
            repeat(20) {
                launch(Dispatchers.Default) {
                    repeat(10) {
                        mutex.withLock { hold ->
                            assertEquals(1, inside.incrementAndGet())
                            tokens += hold.token
                            yield()
                            inside.decrementAndGet()
                        }
                    }
                }
            }
        }
        assertEquals(tokens.sorted().distinct(), tokens)
        assertEquals(200, tokens.size)
    }

    @ParameterizedTest
    @MethodSource("io.github.etcdlock.Outside#targets")
    fun `withLock unlocks however its body ends`(target: String) = onSession(target) { session ->
        val mutex = session.mutex(freshName())
        assertEquals(7, mutex.withLock { 7 })
        assertFailsWith<IllegalStateException> { mutex.withLock { error("mine") } }
        mutex.withLock { it.awaitUnlock() }
        coroutineScope {
            val entered = CompletableDeferred<Unit>()
            val body = launch {
                mutex.withLock {
                    entered.complete(Unit)
                    awaitCancellation()
                }
            }
            entered.await()
            body.cancelAndJoin()
        }
        assertFailsWith<LockTimeoutException> { mutex.withLock { mutex.withLock(Duration.ZERO) { } } }
        mutex.awaitTryLock()!!.awaitUnlock()
        nothingIsLeft(session, mutex.name)
    }

    @Test
    fun `losing the lock cancels the body and surfaces as what it is`() = onSession(ETCD) { session ->
        val name = freshName()
        var cancelled = false
        val error = assertFailsWith<LockLostException> {
            session.mutex(name).withLock {
                Outside.deleteKeys(name)
                try {
                    awaitCancellation()
                } catch (error: CancellationException) {
                    cancelled = true
                    throw error
                }
            }
        }
        assertTrue(cancelled && error.message!!.contains("deleted"))
        // A body that takes no notice: the end of the block says so.
        assertFailsWith<LockLostException> {
            session.mutex(name).withLock { hold ->
                Outside.deleteKeys(name)
                Outside.until { !hold.isHeld() }
            }
        }
        // Its own error wins.
        assertFailsWith<IllegalStateException> {
            session.mutex(name).withLock { hold ->
                Outside.deleteKeys(name)
                Outside.until { !hold.isHeld() }
                error("mine")
            }
        }
        assertEquals(emptyList<String>(), keys(name))
    }

    @Test
    fun `a thousand coroutines wait for the price of one and are served in order`() = onSession("memory:coroutines") { session ->
        val mutex = session.mutex("/thousand")
        val first = mutex.awaitLock()
        val order = ArrayList<Int>()
        coroutineScope {
            val all = List(1000) { n ->
                launch(start = CoroutineStart.UNDISPATCHED) { mutex.withLock { order += n } }
            }
            first.awaitUnlock()
            all.joinAll()
        }
        assertEquals(List(1000) { it }, order)
    }

    @Test
    fun `a blocking call on the library's own thread is refused`() = onSession("memory:deadlock") { session ->
        val mutex = session.mutex("/deadlock")
        val first = mutex.awaitLock()
        coroutineScope {
            val refused = async(Dispatchers.Unconfined) {
                mutex.awaitLock()
                assertFailsWith<DeadlockException> { mutex.unlock() }
                mutex.awaitUnlock()
                Thread.currentThread().name
            }
            first.unlock()
            assertTrue(refused.await().startsWith("etcdlock-notify"))
        }
        assertFalse(mutex.isHeld())
    }
}
