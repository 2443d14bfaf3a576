# Both stacks for publishing, with provenance, SBOM and file times of the commit:
#
#   export SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) REVISION=$(git rev-parse HEAD)
#   docker buildx bake --file docker-bake.hcl --push images
#
# Provenance and SBOM need BuildKit's own builder (docker buildx create --use --driver docker-container); the engine's
# builder makes the same image without them: add --provenance=false --sbom=false.

variable "REGISTRY" { default = "" } # with its slash: registry.example/owner/
variable "VERSION" { default = "0.1.0" }
variable "REVISION" { default = "unknown" }
variable "SOURCE_DATE_EPOCH" { default = "" }
variable "BASE_IMAGE" {
  default = "nvidia/cuda:12.8.1-base-ubuntu24.04@sha256:133c78a0575303be34164d0b90137a042172bdf60696af01a3c424ab402d86e2"
}

group "default" { targets = ["images", "tests"] }
group "images" { targets = ["torch2_9-tf4_57", "torch2_10-tf5_0"] }
group "tests" { targets = ["torch2_9-tf4_57-test", "torch2_10-tf5_0-test"] }

target "_image" {
  context   = "."
  target    = "final"
  platforms = ["linux/amd64"]
  args = {
    BASE_IMAGE        = BASE_IMAGE
    VERSION           = VERSION
    REVISION          = REVISION
    SOURCE_DATE_EPOCH = SOURCE_DATE_EPOCH == "" ? null : SOURCE_DATE_EPOCH
  }
}

target "_published" {
  attest = ["type=provenance,mode=max", "type=sbom"]
}

target "torch2_9-tf4_57" {
  inherits = ["_image", "_published"]
  args     = { STACK = "torch2.9-tf4.57" }
  tags     = ["${REGISTRY}wake2vec:torch2.9-tf4.57", "${REGISTRY}wake2vec:${VERSION}-torch2.9-tf4.57"]
}

target "torch2_10-tf5_0" {
  inherits = ["_image", "_published"]
  args     = { STACK = "torch2.10-tf5.0" }
  tags     = ["${REGISTRY}wake2vec:torch2.10-tf5.0", "${REGISTRY}wake2vec:${VERSION}-torch2.10-tf5.0"]
}

target "torch2_9-tf4_57-test" {
  inherits = ["_image"]
  target   = "test"
  args     = { STACK = "torch2.9-tf4.57" }
  tags     = ["wake2vec:torch2.9-tf4.57-test"]
}

target "torch2_10-tf5_0-test" {
  inherits = ["_image"]
  target   = "test"
  args     = { STACK = "torch2.10-tf5.0" }
  tags     = ["wake2vec:torch2.10-tf5.0-test"]
}
