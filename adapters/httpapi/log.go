package httpapi

import (
	"log/slog"
	"net/http"
)

func attr(key string, v any) slog.Attr { return slog.Any(key, v) }

func levelOf(status int) slog.Level {
	if status == http.StatusInternalServerError {
		return slog.LevelError
	}
	return slog.LevelWarn
}
