// Package schemas holds the contracts: Protobuf for the internal topics and for producers who prefer it, OpenAPI for the HTTP
// intake, AsyncAPI with JSON Schema for the public topics. It owns their compatibility: a change that breaks a reader fails
// `make verify`. The generated message code lives in sagav1 and ordersv1.
package schemas

import "embed" // the contracts are served and checked from the binary itself

// OpenAPI is openapi.yaml, as served at /openapi.yaml.
//
//go:embed openapi.yaml
var OpenAPI []byte

// AsyncAPI is asyncapi.yaml, as served at /asyncapi.yaml. It refers to the files of JSON beside it.
//
//go:embed asyncapi.yaml
var AsyncAPI []byte

// JSON holds the JSON Schemas (draft 07) of the public messages under json/, as served at /json/.
//
//go:embed json/*.schema.json
var JSON embed.FS
