package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

func bootTime() int64 {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &t)
	return t.Nano()
}

type object = map[string]any

var printing sync.Mutex

func say(line object) {
	printing.Lock()
	defer printing.Unlock()
	text, _ := json.Marshal(line)
	_, _ = os.Stdout.Write(append(text, '\n'))
}

type request struct {
	Id                               int64
	Do, Session, Target, Mutex, Name string
	Ttl, Timeout, Op                 int64
	from                             int64
}

func (r request) answer(result object, err error) {
	if result == nil {
		result = object{}
	}
	if err != nil {
		kind := "UNAVAILABLE"
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			kind = "TIMEOUT"
		case errors.Is(err, context.Canceled):
			kind = "CANCELLED"
		case errors.Is(err, concurrency.ErrLocked):
			kind = "BUSY"
		case errors.Is(err, concurrency.ErrSessionExpired):
			kind = "LOST"
		}
		result = object{"kind": kind, "message": err.Error()}
	}
	result["id"], result["from"], result["at"] = r.Id, r.from, bootTime()
	say(result)
}

// A mutex with what Go's does not know of itself: whether it is held.
type held struct {
	*concurrency.Mutex
	session *concurrency.Session
	token   int64
}

// drive serves tests/suite's protocol as far as concurrency.Mutex goes: connect, mutex, lock, try_lock,
// cancel, unlock, state, close. It adds nothing to it: "held" is what a Go program can know, which is that
// it has locked, not unlocked, and that the session is not done.
func drive() {
	clients := map[string]*clientv3.Client{}
	sessions := map[string]*concurrency.Session{}
	mutexes := map[string]*held{}
	cancels := map[int64]context.CancelFunc{}
	var world sync.Mutex
	state := func(m *held) object {
		seen := bootTime()
		world.Lock()
		token := m.token
		world.Unlock()
		alive := token != 0
		select {
		case <-m.session.Done():
			alive = false
		default:
		}
		return object{"held": alive, "remaining": 0, "token": token, "seen": seen}
	}
	say(object{"driver": "go", "version": "client/v3", "lacks": "check put get delete inspect stats"})
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		r := request{from: bootTime()}
		check(json.Unmarshal(lines.Bytes(), &r))
		world.Lock()
		m, session := mutexes[r.Mutex], sessions[r.Session]
		world.Unlock()
		switch r.Do {
		case "connect":
			go func() {
				config := clientv3.Config{
					Endpoints: strings.Split(r.Target, ","), Logger: zap.NewNop(), DialTimeout: 5 * time.Second,
					// Without these a client never leaves a member that accepts and stays silent.
					DialKeepAliveTime: 5 * time.Second, DialKeepAliveTimeout: 2 * time.Second,
				}
				client, err := clientv3.New(config)
				if err != nil {
					r.answer(nil, err)
					return
				}
				session, err := concurrency.NewSession(client, concurrency.WithTTL(int(r.Ttl/1000)))
				if err != nil {
					_ = client.Close()
					r.answer(nil, err)
					return
				}
				world.Lock()
				clients[r.Session], sessions[r.Session] = client, session
				world.Unlock()
				r.answer(object{"ttl": r.Ttl, "lease": int64Text(int64(session.Lease()))}, nil)
			}()
		case "mutex":
			world.Lock()
			mutexes[r.Mutex] = &held{concurrency.NewMutex(session, r.Name), session, 0}
			world.Unlock()
			r.answer(nil, nil)
		case "lock", "try_lock":
			ctx, cancel := context.WithCancel(context.Background())
			if r.Timeout > 0 {
				ctx, cancel = context.WithTimeout(context.Background(), time.Duration(r.Timeout)*time.Millisecond)
			}
			world.Lock()
			cancels[r.Id] = cancel
			world.Unlock()
			go func() {
				defer cancel()
				call := m.Lock
				if r.Do == "try_lock" {
					call = m.TryLock
				}
				err := call(ctx)
				if err != nil {
					r.answer(nil, err)
					return
				}
				// The create revision of the key, out of the comparison that proves ownership.
				owner := m.IsOwner()
				world.Lock()
				m.token = owner.GetCompare().GetCreateRevision()
				token := m.token
				world.Unlock()
				go func() {
					<-m.session.Done()
					world.Lock()
					lost := m.token == token
					world.Unlock()
					if lost {
						say(object{"event": "lost", "mutex": r.Mutex, "token": token, "reason": "session done", "at": bootTime()})
					}
				}()
				r.answer(state(m), nil)
			}()
		case "cancel":
			world.Lock()
			cancels[r.Op]()
			world.Unlock()
			r.answer(nil, nil)
		case "unlock":
			go func() {
				ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
				defer cancel()
				world.Lock()
				m.token = 0
				world.Unlock()
				r.answer(nil, m.Unlock(ctx))
			}()
		case "state":
			r.answer(state(m), nil)
		case "close":
			go func() {
				err := session.Close()
				world.Lock()
				client := clients[r.Session]
				world.Unlock()
				_ = client.Close()
				r.answer(nil, err)
			}()
		default:
			r.answer(nil, errors.New("Go's Mutex has no "+r.Do))
		}
	}
}

func int64Text(n int64) string {
	text, _ := json.Marshal(n)
	return string(text)
}

// observe prints every change under a prefix, in the order of revisions:
//
//	{"type":"put","key":…,"created":…,"revision":…,"lease":…,"at":…}
//	{"type":"delete","key":…,"revision":…,"at":…}
//	{"type":"gap","revision":…,"at":…}    changes up to this revision were compacted before they were seen;
//	                                      what is there at it follows, as puts with "sync"
//
// It ends with its standard input.
func observe(endpoints []string, prefix string) {
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		os.Exit(0)
	}()
	client, err := clientv3.New(clientv3.Config{
		Endpoints: endpoints, Logger: zap.NewNop(), DialTimeout: 5 * time.Second,
		DialKeepAliveTime: 5 * time.Second, DialKeepAliveTimeout: 2 * time.Second,
	})
	check(err)
	look := func() int64 {
		for {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			answer, err := client.Get(ctx, prefix, clientv3.WithPrefix())
			cancel()
			if err == nil {
				for _, kv := range answer.Kvs {
					say(object{"type": "put", "sync": true, "key": string(kv.Key), "created": kv.CreateRevision,
						"revision": kv.ModRevision, "lease": int64Text(kv.Lease), "at": bootTime()})
				}
				return answer.Header.Revision
			}
		}
	}
	next := look() + 1
	say(object{"type": "ready", "revision": next - 1, "at": bootTime()})
	for {
		ctx, cancel := context.WithCancel(clientv3.WithRequireLeader(context.Background()))
		for answer := range client.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(next)) {
			if answer.CompactRevision != 0 {
				say(object{"type": "gap", "revision": answer.CompactRevision, "at": bootTime()})
				next = look() + 1
				break
			}
			for _, event := range answer.Events {
				line := object{"type": "delete", "key": string(event.Kv.Key), "revision": event.Kv.ModRevision, "at": bootTime()}
				if event.Type == clientv3.EventTypePut {
					line["type"], line["created"], line["lease"] = "put", event.Kv.CreateRevision, int64Text(event.Kv.Lease)
				}
				say(line)
				next = event.Kv.ModRevision + 1
			}
			if answer.Err() != nil {
				break
			}
		}
		cancel()
		time.Sleep(20 * time.Millisecond)
	}
}
