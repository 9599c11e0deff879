// A backend and a client of tests/lab/ingress: Go's net/http, which speaks chunked bodies, trailers and 100-continue, and HTTP/2 with all
// that its specification asks of a client at GOAWAY.
//
//	http-peer FOLDER                port 8080; with FOLDER/tls.crt and tls.key also 8443 over TLS, where a PROXY header v1 comes first
//	http-peer load URL CA SECONDS   posts over HTTP/2 without a pause; says how many requests were answered and which were not
//
// FOLDER/page.html is served at /page; what is posted to /report is given back there.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

var report struct {
	sync.Mutex
	text []byte
}

func hostname(w http.ResponseWriter, _ *http.Request) {
	name, _ := os.Hostname()
	fmt.Fprint(w, name)
}

// What came: the protocol, the framing, the body's length and digest; the length in a trailer too.
func echo(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Trailer", "X-Length")
	digest := sha256.New()
	length, err := io.Copy(digest, r.Body)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	fmt.Fprintf(w, "%s %s %s %d %x\n", r.Method, r.Proto, strings.Join(r.TransferEncoding, ","), length, digest.Sum(nil))
	w.Header().Set("X-Length", fmt.Sprint(length))
}

// Three server-sent events, a third of a second apart.
func events(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "text/event-stream")
	for number := range 3 {
		fmt.Fprintf(w, "id: %d\ndata: event %d\n\n", number, number)
		w.(http.Flusher).Flush()
		time.Sleep(time.Second / 3)
	}
}

func reports(w http.ResponseWriter, r *http.Request) {
	report.Lock()
	defer report.Unlock()
	if r.Method == http.MethodPost {
		report.text, _ = io.ReadAll(r.Body)
	}
	w.Write(report.text)
}

// A TLS listener behind a proxy that says first whose connection it is.
type behind struct{ net.Listener }

type named struct {
	net.Conn
	reader *bufio.Reader
	once   sync.Once
	client string
}

func (l behind) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &named{Conn: conn, reader: bufio.NewReader(conn)}, nil
}

// PROXY TCP4 SOURCE DESTINATION PORT PORT
func (c *named) Read(into []byte) (int, error) {
	c.once.Do(func() {
		line, _ := c.reader.ReadString('\n')
		if words := strings.Fields(line); len(words) == 6 && words[0] == "PROXY" {
			c.client = words[2] + " at " + words[3] + " " + words[5]
		}
	})
	if c.client == "" {
		return 0, fmt.Errorf("no PROXY header")
	}
	return c.reader.Read(into)
}

type key struct{}

func client(w http.ResponseWriter, r *http.Request) {
	if conn, ok := r.Context().Value(key{}).(*named); ok {
		fmt.Fprintf(w, "%s %s", r.Proto, conn.client)
		return
	}
	fmt.Fprint(w, r.Header.Get("X-Forwarded-For"))
}

// Four connections with four streams each. A request that has been on its way is not sent again by net/http; one that the server says it
// has not seen is.
func load(url, authority, seconds string) {
	pem, err := os.ReadFile(authority)
	if err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	duration, err := time.ParseDuration(seconds + "s")
	if err != nil {
		log.Fatal(err)
	}
	end := time.Now().Add(duration)
	var answered, failed atomic.Int64
	var all sync.WaitGroup
	body := bytes.Repeat([]byte("x"), 1000)
	for range 4 {
		transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true}
		client := &http.Client{Transport: transport, Timeout: 10 * time.Second}
		for range 4 {
			all.Go(func() {
				for time.Now().Before(end) {
					response, err := client.Post(url, "text/plain", bytes.NewReader(body))
					if err == nil {
						_, err = io.Copy(io.Discard, response.Body)
						response.Body.Close()
						if err == nil && (response.StatusCode != http.StatusOK || response.ProtoMajor != 2) {
							err = fmt.Errorf("%s %s", response.Proto, response.Status)
						}
					}
					if err != nil {
						failed.Add(1)
						log.Print(err)
						continue
					}
					answered.Add(1)
				}
			})
		}
	}
	all.Wait()
	fmt.Printf("%d answered, %d failed\n", answered.Load(), failed.Load())
	if failed.Load() > 0 || answered.Load() < 500 {
		os.Exit(1)
	}
}

func main() {
	if os.Args[1] == "load" {
		load(os.Args[2], os.Args[3], os.Args[4])
		return
	}
	folder := os.Args[1]
	http.HandleFunc("/hostname", hostname)
	http.HandleFunc("/echo", echo)
	http.HandleFunc("/events", events)
	http.HandleFunc("/report", reports)
	http.HandleFunc("/client", client)
	http.HandleFunc("/page", func(w http.ResponseWriter, r *http.Request) {
		http.ServeFile(w, r, filepath.Join(folder, "page.html"))
	})
	secure := &http.Server{ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
		if conn, ok := conn.(*tls.Conn); ok {
			return context.WithValue(ctx, key{}, conn.NetConn())
		}
		return ctx
	}}
	certificate := filepath.Join(folder, "tls.crt")
	if _, err := os.Stat(certificate); err == nil {
		listener, err := net.Listen("tcp", ":8443")
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			log.Fatal(secure.ServeTLS(behind{listener}, certificate, filepath.Join(folder, "tls.key")))
		}()
	}
	log.Fatal(http.ListenAndServe(":8080", nil))
}
