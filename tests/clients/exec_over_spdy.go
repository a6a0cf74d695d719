// exec_over_spdy URL MEGABYTES
//
// Runs the command behind the URL of an Exec through the SPDY library that kubectl's descends from (Debian:
// golang-github-docker-spdystream-dev): sends so many megabytes to its standard input, prints what came on each stream
// (a digest if it is long) as JSON.
package main

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/docker/spdystream"
)

const protocol = "v4.channel.k8s.io"

func check(err error, doing string) {
	if err != nil {
		fmt.Fprintln(os.Stderr, doing+":", err)
		os.Exit(1)
	}
}

func upgrade(place string) net.Conn {
	address, err := url.Parse(place)
	check(err, "read the URL")
	socket, err := net.Dial("tcp", address.Host)
	check(err, "connect")
	fmt.Fprintf(socket, "POST %s HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n"+
		"X-Stream-Protocol-Version: %s\r\n\r\n", address.RequestURI(), address.Host, protocol)
	var head strings.Builder
	for !strings.HasSuffix(head.String(), "\r\n\r\n") {
		var one [1]byte
		_, err := io.ReadFull(socket, one[:])
		check(err, "read the answer")
		head.Write(one[:])
	}
	if !strings.HasPrefix(head.String(), "HTTP/1.1 101 ") {
		fmt.Fprintln(os.Stderr, head.String())
		os.Exit(1)
	}
	return socket
}

func open(connection *spdystream.Connection, kind string) *spdystream.Stream {
	headers := http.Header{}
	headers.Set("streamType", kind)
	stream, err := connection.CreateStream(headers, nil, false)
	check(err, "open "+kind)
	check(stream.Wait(), "open "+kind)
	return stream
}

func digest(sum []byte) string { return "sha256:" + hex.EncodeToString(sum) }

func main() {
	megabytes, err := strconv.Atoi(os.Args[2])
	check(err, "read the number of megabytes")
	connection, err := spdystream.NewConnection(upgrade(os.Args[1]), false)
	check(err, "begin")
	go connection.Serve(spdystream.NoOpStreamHandler)
	streams := map[string]*spdystream.Stream{}
	for _, kind := range []string{"error", "stdin", "stdout", "stderr"} {
		streams[kind] = open(connection, kind)
	}
	_, err = connection.Ping()
	check(err, "ping")

	told := map[string]string{}
	var lock sync.Mutex
	var done sync.WaitGroup
	for _, kind := range []string{"error", "stdout", "stderr"} {
		done.Add(1)
		go func(kind string) {
			defer done.Done()
			sum := sha256.New()
			var text strings.Builder
			buffer := make([]byte, 32<<10)
			length := 0
			for {
				count, err := streams[kind].Read(buffer)
				sum.Write(buffer[:count])
				if length += count; length < 4096 {
					text.Write(buffer[:count])
				}
				if err != nil {
					break
				}
			}
			lock.Lock()
			defer lock.Unlock()
			told[kind] = text.String()
			if length >= 4096 {
				told[kind] = digest(sum.Sum(nil))
			}
		}(kind)
	}
	block := make([]byte, 1<<20)
	for index := range block {
		block[index] = byte(index * 7 % 251)
	}
	sum := sha256.New()
	for count := 0; count < megabytes; count++ {
		_, err := streams["stdin"].Write(block)
		check(err, "write")
		sum.Write(block)
	}
	check(streams["stdin"].Close(), "end the input")
	done.Wait()
	told["sent"] = digest(sum.Sum(nil))
	check(json.NewEncoder(os.Stdout).Encode(told), "print")
}
