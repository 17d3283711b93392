package simulator

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

const journalName = "gateway.journal"

// change is everything that one request did: what it made of an intent, its refund, and the answer kept under its key. It is one
// line of the journal: they are kept together or not at all.
type change struct {
	Intent *intent `json:"intent,omitempty"`
	Refund *refund `json:"refund,omitempty"`
	Key    *stored `json:"key,omitempty"`
}

// journal appends changes to a file. The zero value keeps nothing.
type journal struct {
	file   *os.File
	buf    bytes.Buffer
	broken error // of a write that may have left half a line: nothing may follow it
}

func (j *journal) append(c change) error {
	if j.file == nil {
		return nil
	}
	if j.broken != nil {
		return j.broken
	}
	j.buf.Reset()
	if err := json.NewEncoder(&j.buf).Encode(c); err != nil { // one line, ending in \n
		return fmt.Errorf("gateway journal: %w", err)
	}
	if _, err := j.file.Write(j.buf.Bytes()); err != nil {
		j.broken = fmt.Errorf("gateway journal: %w", err)
		return j.broken
	}
	return nil
}

func (j *journal) close() error {
	if j.file == nil {
		return nil
	}
	err := j.file.Close()
	j.file = nil
	j.broken = errors.New("gateway journal: closed")
	return err
}

// readJournal applies every whole line. A last line without its end was being written when the process was killed: nobody was
// answered for it, and it is dropped. Any other line that cannot be read is damage, and an error.
func readJournal(path string, apply func(change)) error {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("gateway journal: %w", err)
	}
	defer f.Close()
	r := bufio.NewReaderSize(f, 1<<16)
	for n := 1; ; n++ {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("gateway journal: %w", err)
		}
		var c change
		if err := json.Unmarshal(line, &c); err != nil {
			return fmt.Errorf("gateway journal %s is damaged at line %d (%w): move the file away to start with an empty ledger", path, n, err)
		}
		apply(c)
	}
}

// openJournal writes what the ledger holds now into a new file, puts it in the old one's place and goes on appending to it. So what
// is superseded or expired is dropped at every start.
func openJournal(dir string, state func(yield func(change) bool)) (*journal, error) {
	path := filepath.Join(dir, journalName)
	f, err := os.OpenFile(path+".new", os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("gateway journal: %w", err)
	}
	w := bufio.NewWriterSize(f, 1<<16)
	e := json.NewEncoder(w)
	for c := range state {
		if err = e.Encode(c); err != nil {
			break
		}
	}
	if err == nil {
		err = w.Flush()
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("gateway journal: %w", err), f.Close())
	}
	return &journal{file: f}, nil
}
