package main

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/bufbuild/protocompile"
	"github.com/bufbuild/protocompile/linker"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"
)

// object is a message as its canonical JSON with the field names of the .proto files.
type object = map[string]any

// at returns the object under the path of keys, made where it is missing.
func at(o object, keys ...string) object {
	for _, key := range keys {
		next, ok := o[key].(object)
		if !ok {
			next = object{}
			o[key] = next
		}
		o = next
	}
	return o
}

// text returns the string under key, or "".
func text(o object, key string) string {
	s, _ := o[key].(string)
	return s
}

// wire knows the messages, read from the .proto files at run time.
type wire struct{ files linker.Files }

func loadWire(ctx context.Context, folder string) (*wire, error) {
	sources := protocompile.WithStandardImports(&protocompile.SourceResolver{ImportPaths: []string{folder}})
	compiler := protocompile.Compiler{Resolver: sources}
	files, err := compiler.Compile(ctx, "connectioncontext.proto", "connection.proto", "networkservice.proto", "registry.proto")
	if err != nil {
		return nil, fmt.Errorf("NSM_PROTOS %s: %w", folder, err)
	}
	return &wire{files}, nil
}

// empty makes an empty message of the full name.
func (w *wire) empty(name string) (*dynamicpb.Message, error) {
	descriptor, err := w.files.AsResolver().FindDescriptorByName(protoreflect.FullName(name))
	if err != nil {
		return nil, fmt.Errorf("message %s: %w", name, err)
	}
	return dynamicpb.NewMessage(descriptor.(protoreflect.MessageDescriptor)), nil
}

// message makes a message of the full name.
func (w *wire) message(name string, content object) (*dynamicpb.Message, error) {
	text, err := json.Marshal(content)
	if err != nil {
		return nil, err
	}
	message, err := w.empty(name)
	if err != nil {
		return nil, err
	}
	if err := protojson.Unmarshal(text, message); err != nil {
		return nil, fmt.Errorf("message %s: %w", name, err)
	}
	return message, nil
}

func content(message proto.Message) (object, error) {
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(message)
	if err != nil {
		return nil, err
	}
	var o object
	return o, json.Unmarshal(text, &o)
}

// segments returns the index and the segments of a connection's path.
func segments(connection object) (int, []object) {
	path := at(connection, "path")
	index, _ := path["index"].(float64)
	list, _ := path["path_segments"].([]any)
	var out []object
	for _, segment := range list {
		out = append(out, segment.(object))
	}
	return int(index), out
}

// setSegments writes the path of a connection.
func setSegments(connection object, index int, list []object) {
	path := at(connection, "path")
	path["index"] = float64(index)
	out := make([]any, len(list))
	for i, segment := range list {
		out[i] = segment
	}
	path["path_segments"] = out
}
