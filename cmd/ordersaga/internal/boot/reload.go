package boot

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"reflect"
	"time"
)

// reloadEvery is how often files are looked at. A look is a stat: cheap, and it sees what a rename or a mounted secret changes.
const reloadEvery = 2 * time.Second

// watch calls changed whenever one of the files has another content's stamp than before, until ctx ends.
func watch(ctx context.Context, paths []string, changed func(path string)) error {
	stamps := make([]fileStamp, len(paths))
	for i, p := range paths {
		stamps[i] = stampOf(p)
	}
	t := time.NewTicker(reloadEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		for i, p := range paths {
			if s := stampOf(p); s != stamps[i] {
				stamps[i] = s
				if !s.missing { // half of a replacement; the other half comes
					changed(p)
				}
			}
		}
	}
}

type fileStamp struct {
	mod     time.Time
	size    int64
	missing bool
}

func stampOf(path string) fileStamp {
	fi, err := os.Stat(path)
	if err != nil {
		return fileStamp{missing: errors.Is(err, fs.ErrNotExist) || err != nil}
	}
	return fileStamp{mod: fi.ModTime(), size: fi.Size()}
}

// reloadable copies from next into c what may change while the process runs, and names the settings that differ and need a restart.
func (c *Config) reloadable(next *Config) (needRestart []string) {
	c.Log.Level = next.Log.Level
	c.HTTP.Rate, c.HTTP.Burst = next.HTTP.Rate, next.HTTP.Burst
	c.Payment.Rate, c.Payment.Burst, c.Payment.Concurrency = next.Payment.Rate, next.Payment.Burst, next.Payment.Concurrency
	c.Intake.MaxRunning, c.Intake.MaxLag, c.Intake.MinDisk = next.Intake.MaxRunning, next.Intake.MaxLag, next.Intake.MinDisk
	c.Intake.MaxDelay = next.Intake.MaxDelay
	return differing("", reflect.ValueOf(*c), reflect.ValueOf(*next))
}

func differing(prefix string, a, b reflect.Value) (out []string) {
	for i := range a.NumField() {
		key := prefix + a.Type().Field(i).Tag.Get("koanf")
		if a.Field(i).Kind() == reflect.Struct {
			out = append(out, differing(key+".", a.Field(i), b.Field(i))...)
		} else if !reflect.DeepEqual(a.Field(i).Interface(), b.Field(i).Interface()) {
			out = append(out, key)
		}
	}
	return out
}
