package events

import (
	"google.golang.org/protobuf/reflect/protoreflect"
	"pgregory.net/rapid"
)

// drawMessage sets every field of a generated message to something.
func drawMessage(t *rapid.T, m protoreflect.Message) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		if !f.IsList() {
			m.Set(f, drawValue(t, f))
			continue
		}
		l := m.Mutable(f).List()
		for range rapid.IntRange(0, 5).Draw(t, "length") {
			el := l.NewElement()
			drawMessage(t, el.Message()) // the only lists are of messages
			l.Append(el)
		}
	}
}

func drawValue(t *rapid.T, f protoreflect.FieldDescriptor) protoreflect.Value {
	switch f.Kind() { //nolint:exhaustive // the kinds in use
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(rapid.String().Draw(t, string(f.Name())))
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(rapid.Int64().Draw(t, string(f.Name())))
	case protoreflect.Int32Kind:
		return protoreflect.ValueOfInt32(rapid.Int32().Draw(t, string(f.Name())))
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(rapid.Bool().Draw(t, string(f.Name())))
	}
	panic("no generator for kind " + f.Kind().String())
}
