// What this CPU can do, and what Linux lets a process do with it.
#pragma once

#include <set>
#include <string>

// Linux' names, as in hwmpq/targets.py; empty where the system does not tell.
std::set<std::string> cpu_flags();

// Asks for AMX's tile registers: Documentation/arch/x86/xstate.rst.
bool may_use_tiles();
