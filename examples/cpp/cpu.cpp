#include "cpu.h"

#ifdef __aarch64__

#include <sys/auxv.h>

// From the kernel: an emulator shows the /proc/cpuinfo of the machine that it runs on.
// Source: Linux arch/arm64/include/uapi/asm/hwcap.h.
std::set<std::string> cpu_flags() {
  struct Flag {
    const char *name;
    unsigned long word;
    int bit;
  };
  std::set<std::string> found;
  for (const Flag &flag : {Flag{"asimd", AT_HWCAP, 1}, Flag{"fphp", AT_HWCAP, 9},
                           Flag{"asimdhp", AT_HWCAP, 10}, Flag{"asimddp", AT_HWCAP, 20},
                           Flag{"i8mm", AT_HWCAP2, 13}, Flag{"bf16", AT_HWCAP2, 14}})
    if (getauxval(flag.word) >> flag.bit & 1) found.insert(flag.name);
  return found;
}

bool may_use_tiles() { return false; }

#else

#include <sys/syscall.h>
#include <unistd.h>

#include <fstream>
#include <sstream>

std::set<std::string> cpu_flags() {
  std::ifstream file("/proc/cpuinfo");
  std::set<std::string> flags;
  for (std::string line; flags.empty() && std::getline(file, line);)
    if (line.rfind("flags", 0) == 0) {
      std::istringstream words(line.substr(line.find(':') + 1));
      for (std::string word; words >> word;) flags.insert(word);
    }
  return flags;
}

bool may_use_tiles() {
  constexpr long kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

#endif
