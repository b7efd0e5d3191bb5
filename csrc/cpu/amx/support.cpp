// Whether AMX can be used, and the pool of memory.
#include <ATen/ops/from_blob.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace awnet::cpu::amx {
namespace {

std::string find_obstacle() {
#if defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  const auto has = [](unsigned bits, int place) { return (bits >> place & 1) != 0; };
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !has(d, 24) || !has(d, 22)) {
    return "the processor has no AMX for bfloat16";
  }
  if (!has(b, 16) || !has(b, 17) || !has(b, 30) || !has(b, 31) || !__get_cpuid_count(7, 1, &a, &b, &c, &d) ||
      !has(a, 5)) {
    return "the processor has AMX without AVX512_BF16";
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) != 0) {
    return std::string("the kernel refuses this process the use of AMX (arch_prctl: ") +
           std::strerror(errno) + ")";
  }
  return "";
#else
  return "AMX needs an x86-64 processor and Linux";
#endif
}

constexpr size_t kPage = 1 << 21;
constexpr size_t kMaxFree = 8;  // blocks

class Pool {
 public:
  std::pair<void*, size_t> take(size_t bytes) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      const auto entry = free_.lower_bound(bytes);
      if (entry != free_.end() && entry->first <= 2 * bytes + kPage) {
        const std::pair<void*, size_t> block(entry->second, entry->first);
        free_.erase(entry);
        return block;
      }
    }
    void* const block = std::aligned_alloc(kPage, bytes);
    TORCH_CHECK(block != nullptr, "out of memory: ", bytes, " bytes for a network's activations");
#if defined(__linux__)
    madvise(block, bytes, MADV_HUGEPAGE);
#endif
    return {block, bytes};
  }

  void give(void* block, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.emplace(bytes, block);
    if (free_.size() > kMaxFree) {
      std::free(free_.begin()->second);
      free_.erase(free_.begin());
    }
  }

 private:
  std::mutex mutex_;
  std::multimap<size_t, void*> free_;
};

Pool& pool() {
  static Pool* const pool = new Pool;  // never destroyed: tensors may die later
  return *pool;
}

}  // namespace

const std::string& obstacle() {
  static const std::string reason = find_obstacle();
  return reason;
}

const Kernels& kernels(bool emulate) {
  if (emulate) return emulated::kernels;
  TORCH_CHECK(obstacle().empty(), obstacle());
#if defined(__x86_64__)
  return hardware::kernels;
#else
  return emulated::kernels;
#endif
}

const Kernels* kernels_for_layers() {
  const char* const mode = std::getenv("AWNET_AMX");
  if (mode != nullptr && std::strcmp(mode, "emulate") == 0) return &kernels(true);
  const bool off = mode != nullptr && std::strcmp(mode, "0") == 0;
  return off || !obstacle().empty() ? nullptr : &kernels(false);
}

Tensor pooled_memory(int64_t bytes) {
  const auto [block, size] = pool().take((static_cast<size_t>(bytes) / kPage + 1) * kPage);
  return at::from_blob(
      block, {bytes}, [size = size](void* block) { pool().give(block, size); }, at::TensorOptions(at::kByte));
}

}  // namespace awnet::cpu::amx
