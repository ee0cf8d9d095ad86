// The artifact that this program was built with.
#pragma once

#include "artifact.h"

// Throws Refused.
Artifact open_embedded();
