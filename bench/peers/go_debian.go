//go:build ignore

// The rounds and puts of tests/peers/go, with the client that Debian ships (golang-etcd-server-dev), whose
// packages have other paths and no TryLock. bench/run.sh builds it without modules.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"go.etcd.io/etcd/clientv3"
	"go.etcd.io/etcd/clientv3/concurrency"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

func main() {
	if len(os.Args) != 5 {
		fmt.Fprintln(os.Stderr, "usage: go_debian rounds|put ENDPOINT NAME ROUNDS")
		os.Exit(64)
	}
	what, endpoint, name := os.Args[1], os.Args[2], os.Args[3]
	rounds, err := strconv.Atoi(os.Args[4])
	check(err)
	ctx := context.Background()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, DialTimeout: 5 * time.Second})
	check(err)
	defer client.Close()
	session, err := concurrency.NewSession(client, concurrency.WithTTL(10))
	check(err)
	defer session.Close()
	mutex := concurrency.NewMutex(session, name)
	once := func() {
		check(mutex.Lock(ctx))
		check(mutex.Unlock(ctx))
	}
	if what == "put" {
		once = func() {
			_, err := client.Put(ctx, name, "x")
			check(err)
		}
	}

	fmt.Println("ready")
	_, err = bufio.NewReader(os.Stdin).ReadString('\n')
	check(err)
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	for i := 0; i < rounds; i++ {
		start := time.Now()
		once()
		fmt.Fprintln(out, "enter", 0, time.Since(start).Nanoseconds())
	}
}
