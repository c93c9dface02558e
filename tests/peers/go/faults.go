package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"
)

// What etcd's own client does under the faults of docs/safety.md:
//
//	peer lost  ENDPOINT NAME TTL       lock, print "held KEY TOKEN", and "lost" when the session says that it is over
//	peer crowd ENDPOINT NAME ROUNDS    eight goroutines of one session, each with a mutex of that name, then all with
//	                                   one mutex: prints how many rounds found another one inside, and panicked
func faults(what, endpoint, name string, number int) {
	ctx := context.Background()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop(), DialTimeout: 5 * time.Second})
	check(err)
	ttl := 10
	if what == "lost" {
		ttl = number
	}
	session, err := concurrency.NewSession(client, concurrency.WithTTL(ttl))
	check(err)
	if what == "crowd" {
		each := crowd(session, name, number, func() *concurrency.Mutex { return concurrency.NewMutex(session, name) })
		one := concurrency.NewMutex(session, name+"-one")
		shared := crowd(session, name, number, func() *concurrency.Mutex { return one })
		fmt.Println("inside", each, shared)
		return
	}
	mutex := concurrency.NewMutex(session, name)
	fmt.Println("ready")
	if err := mutex.Lock(ctx); err != nil {
		fmt.Println("error", err)
		os.Exit(0)
	}
	answer, err := client.Get(ctx, mutex.Key())
	if err != nil || len(answer.Kvs) == 0 {
		fmt.Println("held", mutex.Key(), "0")
	} else {
		fmt.Println("held", mutex.Key(), answer.Kvs[0].CreateRevision)
	}
	<-session.Done()
	fmt.Println("lost")
}

// crowd counts how often somebody was inside while another was, in rounds by eight goroutines.
func crowd(session *concurrency.Session, name string, rounds int, mutex func() *concurrency.Mutex) string {
	var inside, found, taken, panics int64
	var all sync.WaitGroup
	for i := 0; i < 8; i++ {
		mine := mutex()
		all.Add(1)
		go func() {
			defer all.Done()
			for atomic.AddInt64(&taken, 1) <= int64(rounds) {
				func() {
					limit, cancel := context.WithTimeout(context.Background(), 5*time.Second)
					defer cancel()
					defer func() {
						if recover() != nil {
							atomic.AddInt64(&panics, 1)
						}
					}()
					if err := mine.Lock(limit); err != nil {
						return
					}
					if atomic.AddInt64(&inside, 1) > 1 {
						atomic.AddInt64(&found, 1)
					}
					time.Sleep(100 * time.Microsecond)
					atomic.AddInt64(&inside, -1)
					_ = mine.Unlock(limit)
				}()
			}
		}()
	}
	all.Wait()
	return fmt.Sprintf("%d (panics: %d)", found, panics)
}

// isFaults says whether the command line is one of faults, and runs it.
func isFaults() bool {
	if len(os.Args) != 5 || (os.Args[1] != "lost" && os.Args[1] != "crowd") {
		return false
	}
	number, err := strconv.Atoi(os.Args[4])
	check(err)
	faults(os.Args[1], os.Args[2], os.Args[3], number)
	return true
}
