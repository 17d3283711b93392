package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestFailuresPageNamesTestsThatAreThere holds docs/failures.md to the code: a test that was renamed or lost is missed at once, and none of
// the 43 entries is left out.
func TestFailuresPageNamesTestsThatAreThere(t *testing.T) {
	root := filepath.Join("..", "..")
	b, err := os.ReadFile(filepath.Join(root, "docs", "failures.md"))
	require.NoError(t, err)
	page := string(b)
	for n := range 43 {
		require.Regexp(t, `(?m)^\| F`+strconv.Itoa(n+1)+` \|`, page)
	}

	there := map[string]bool{} // "package: test"
	declared := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	require.NoError(t, filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != root && strings.HasPrefix(d.Name(), ".") {
			return filepath.SkipDir
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		src, err := os.ReadFile(path) //nolint:gosec // the checkout's own files
		if err != nil {
			return err
		}
		pkg, err := filepath.Rel(root, filepath.Dir(path))
		for _, m := range declared.FindAllSubmatch(src, -1) {
			there[filepath.ToSlash(pkg)+": "+string(m[1])] = true
		}
		return err
	}))

	cell := regexp.MustCompile("`([a-z/]+)`: ((?:`Test\\w+`(?:, )?)+)")
	name := regexp.MustCompile(`Test\w+`)
	named := 0
	for _, c := range cell.FindAllStringSubmatch(page, -1) {
		for _, test := range name.FindAllString(c[2], -1) {
			require.True(t, there[c[1]+": "+test], "docs/failures.md names %s of %s, which is not there", test, c[1])
			named++
		}
	}
	require.Greater(t, named, 100)
}
