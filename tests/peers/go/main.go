// Command peer locks with etcd's own Go client (concurrency.Mutex), for etcdlock's tests and benchmark.
//
//	peer rounds  ENDPOINT NAME ROUNDS   lock and unlock ROUNDS times
//	peer put     ENDPOINT KEY  ROUNDS   put ROUNDS times
//	peer try     ENDPOINT NAME ROUNDS   try a lock that another session holds
//	peer many    ENDPOINT NAME ROUNDS   256 goroutines, each with a name of its own
//	peer classic ENDPOINT NAME ROUNDS   ROUNDS goroutines want one lock, with a session each
//	peer hold    ENDPOINT NAME          lock, print "held TOKEN", unlock when standard input closes
//	peer drive                          the part of tests/suite's protocol that Go's Mutex has
//	peer observe ENDPOINTS PREFIX       print every change under PREFIX as a line of JSON
//
// All but the last two start with a line "ready" and wait for a line on standard input. All but "hold"
// of those print, for each round, "enter TOKEN NANOSECONDS" where the last is how long the call took.
package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func main() {
	if len(os.Args) == 2 && os.Args[1] == "drive" {
		drive()
		return
	}
	if len(os.Args) == 4 && os.Args[1] == "observe" {
		observe(strings.Split(os.Args[2], ","), os.Args[3])
		return
	}
	if isFaults() {
		return
	}
	if len(os.Args) < 4 {
		fmt.Fprintln(os.Stderr, "usage: peer rounds|put|try|many|classic|hold ENDPOINT NAME [ROUNDS]")
		os.Exit(64)
	}
	what, endpoint, name := os.Args[1], os.Args[2], os.Args[3]
	rounds := 0
	if len(os.Args) > 4 {
		var err error
		rounds, err = strconv.Atoi(os.Args[4])
		check(err)
	}
	ctx := context.Background()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop(), DialTimeout: 5 * time.Second})
	check(err)
	defer client.Close()
	session, err := concurrency.NewSession(client, concurrency.WithTTL(10))
	check(err)
	defer session.Close()
	mutex := concurrency.NewMutex(session, name)

	if what == "try" {
		other, err := concurrency.NewSession(client, concurrency.WithTTL(10))
		check(err)
		defer other.Close()
		check(concurrency.NewMutex(other, name).Lock(ctx))
	}
	stdin := bufio.NewReader(os.Stdin)
	fmt.Println("ready")
	_, err = stdin.ReadString('\n')
	check(err)

	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	switch what {
	case "rounds":
		for i := 0; i < rounds; i++ {
			start := time.Now()
			check(mutex.Lock(ctx))
			// The create revision of the key, as etcd's documentation has it.
			get, err := tokenOf(ctx, client, mutex)
			check(err)
			check(mutex.Unlock(ctx))
			fmt.Fprintln(out, "enter", get, time.Since(start).Nanoseconds())
		}
	case "put":
		for i := 0; i < rounds; i++ {
			start := time.Now()
			_, err := client.Put(ctx, name, "x")
			check(err)
			fmt.Fprintln(out, "enter", 0, time.Since(start).Nanoseconds())
		}
	case "try":
		for i := 0; i < rounds; i++ {
			start := time.Now()
			if err := mutex.TryLock(ctx); err != concurrency.ErrLocked {
				check(fmt.Errorf("a try of a lock that is held: %v", err))
			}
			fmt.Fprintln(out, "enter", 0, time.Since(start).Nanoseconds())
		}
	case "many":
		took := make([][]time.Duration, names)
		side(names, func(i int) {
			mutex := concurrency.NewMutex(session, fmt.Sprintf("%s-%d", name, i))
			for n := 0; n < rounds/names; n++ {
				start := time.Now()
				check(mutex.Lock(ctx))
				check(mutex.Unlock(ctx))
				took[i] = append(took[i], time.Since(start))
			}
		})
		for _, each := range took {
			for _, d := range each {
				fmt.Fprintln(out, "enter", 0, d.Nanoseconds())
			}
		}
	case "classic":
		took := make([]time.Duration, rounds)
		side(rounds, func(i int) {
			start := time.Now()
			session, err := concurrency.NewSession(client, concurrency.WithTTL(10))
			check(err)
			defer session.Close()
			mutex := concurrency.NewMutex(session, name)
			check(mutex.Lock(ctx))
			check(mutex.Unlock(ctx))
			took[i] = time.Since(start)
		})
		for _, d := range took {
			fmt.Fprintln(out, "enter", 0, d.Nanoseconds())
		}
	case "hold":
		check(mutex.Lock(ctx))
		token, err := tokenOf(ctx, client, mutex)
		check(err)
		fmt.Fprintln(out, "held", token)
		check(out.Flush())
		_, _ = io.Copy(io.Discard, stdin)
		check(mutex.Unlock(ctx))
	default:
		fmt.Fprintln(os.Stderr, "peer: unknown:", what)
		os.Exit(64)
	}
}

const names = 256

// side runs count goroutines side by side and waits for them.
func side(count int, run func(int)) {
	var all sync.WaitGroup
	for i := 0; i < count; i++ {
		all.Add(1)
		go func() {
			defer all.Done()
			run(i)
		}()
	}
	all.Wait()
}

// tokenOf is only asked for where a test needs it: it costs a read, which the benchmark leaves out.
func tokenOf(ctx context.Context, client *clientv3.Client, mutex *concurrency.Mutex) (int64, error) {
	if os.Getenv("PEER_NO_TOKEN") != "" {
		return mutex.Header().Revision, nil
	}
	answer, err := client.Get(ctx, mutex.Key())
	if err != nil {
		return 0, err
	}
	if len(answer.Kvs) == 0 {
		return 0, fmt.Errorf("the key %s is gone", mutex.Key())
	}
	return answer.Kvs[0].CreateRevision, nil
}
