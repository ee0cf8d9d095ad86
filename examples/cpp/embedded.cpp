#include "embedded.h"

// HWMPQ_EMBEDDED: the artifact's folder, as CMakeLists.txt gives it.
#define EMBED(symbol, file)                                                                        \
  asm(".pushsection .rodata\n.balign 8\n.global " #symbol ", " #symbol "_end\n" #symbol ":\n"        \
      ".incbin \"" HWMPQ_EMBEDDED "/" file "\"\n" #symbol "_end:\n.byte 0\n.popsection\n");           \
  extern "C" const char symbol[], symbol##_end[]

EMBED(hwmpq_manifest, "manifest.json");
EMBED(hwmpq_parameters, "parameters.safetensors");

Artifact open_embedded() {
  return take_embedded({hwmpq_manifest, hwmpq_manifest_end},
                       {hwmpq_parameters, hwmpq_parameters_end});
}
