// The operators' schemas, and their CPU implementation. _C_cuda adds a CUDA implementation to the same schemas.
#include <sys/mman.h>

#include <charconv>
#include <cstdlib>
#include <string>
#include <string_view>
#include <system_error>

#include "cpu/kept.h"
#include "cpu/kernels.h"
#include "operators.h"

namespace igrpo {
namespace {

struct Cpu {
  // Threads get whole rows, so no result depends on their number. A tiny job is not worth waking them.
  template <class F>
  static void for_rows(const Rows& rows, const F& f) {
    constexpr int64_t kLogitsPerThread = 32768;
    const int64_t grain = kLogitsPerThread / (rows.vocab > 0 ? rows.vocab : 1) + 1;
    const cpu::Kernels& kernels = cpu::kernels();
    torch::stable::parallel_for(0, rows.n, grain, [&](int64_t begin, int64_t end) { f(kernels, begin, end); });
  }

  // A fresh gradient is hundreds of megabytes of untouched pages, whose faults can take longer than the kernel. So memory
  // that held one is kept for the next, from the moment that nobody holds it any more: then, and not before, its storage
  // calls the deleter.
  static Tensor new_grad(const Tensor& logits) {
    return new_kept(logits, {logits.size(0), logits.size(1), logits.size(2)});
  }

  static Tensor new_kept(const Tensor& like, const std::vector<int64_t>& shape) {
    std::vector<int64_t> strides(shape.size());
    int64_t count = 1;
    for (size_t i = shape.size(); i-- > 0; count *= shape[i]) strides[i] = count;
    const int64_t bytes = count * static_cast<int64_t>(like.element_size()), limit = kept_limit();
    if (bytes < kHuge || bytes > limit) return new_pages(like, shape);
    std::optional<Tensor> found = kept().take(bytes, limit);
    Tensor block = found.has_value() ? std::move(*found) : new_pages(like, shape);
    const auto give_back = [block, limit](void*) {
      const int64_t size = block.numel() * static_cast<int64_t>(block.element_size());
      kept().give_back(block, size, limit);
    };
    return torch::stable::from_blob(block.data_ptr(), shape, strides, like.device(), like.scalar_type(), give_back);
  }

  // Never destroyed: a gradient may outlive every static object.
  static cpu::Kept<Tensor>& kept() {
    static auto& blocks = *new cpu::Kept<Tensor>;
    return blocks;
  }

  // Read at every call, as the instruction set is.
  static int64_t kept_limit() {
    const char* variable = std::getenv("IGRPO_CPU_KEEP_MIB");
    const std::string_view text = variable == nullptr || *variable == '\0' ? "2048" : variable;
    int64_t mib = -1;
    const auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), mib);
    STD_TORCH_CHECK(error == std::errc() && rest == text.data() + text.size() && mib >= 0 && mib < int64_t{1} << 43,
                    "IGRPO_CPU_KEEP_MIB=", text, " is not a number of MiB; write a whole number such as 2048, 0 to keep "
                    "nothing, or leave it out");
    return mib << 20;
  }

  static constexpr int64_t kHuge = int64_t{1} << 21;

  // Asking for 2 MiB pages saves most of the faults.
  static Tensor new_pages(const Tensor& like, const std::vector<int64_t>& shape) {
    Tensor pages = torch::stable::new_empty(like, shape);
#if defined(__linux__)
    const uintptr_t begin = reinterpret_cast<uintptr_t>(pages.data_ptr());
    const uintptr_t end = begin + static_cast<uintptr_t>(pages.numel()) * pages.element_size();
    const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
    // Only advice: where it is refused nothing changes but the time.
    if (first < last) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
    return pages;
  }

  static void row_stats(const Tensor&, const Rows& rows, const RowStats& out) {
    for_rows(rows, [&](const cpu::Kernels& k, int64_t begin, int64_t end) { k.row_stats(rows, out, begin, end); });
  }

  static void row_grad(const Tensor&, const Rows& rows, const RowStats& stats, const RowGradients& g) {
    for_rows(rows, [&](const cpu::Kernels& k, int64_t begin, int64_t end) { k.row_grad(rows, stats, g, begin, end); });
  }

  static void token_loss(const Tensor&, const Rows& rows, const RowStats& out, const TokenConstants& c) {
    for_rows(rows, [&](const cpu::Kernels& k, int64_t begin, int64_t end) { k.token_loss(rows, out, c, begin, end); });
  }
};

std::string cpu_capability() { return cpu::kernels().name; }

Tensor cpu_new(Tensor like, std::vector<int64_t> shape) {
  IGRPO_CHECK(like.is_cpu(), "cpu_new makes CPU tensors");
  return Cpu::new_kept(like, shape);
}

int64_t cpu_keep_at_most(int64_t bytes) { return Cpu::kept().keep_at_most(bytes); }

std::string policy_terms() { return kPolicyTermNames; }

std::string source_hash() { return IGRPO_SOURCE_HASH; }

}  // namespace
}  // namespace igrpo

#define IGRPO_TRANSFORM "float logit_scale, float softcap, float temperature, Tensor? temperatures=None"
#define IGRPO_ROWS "Tensor index, Tensor? mask"
#define IGRPO_STATS "Tensor logps, Tensor entropy, Tensor norm, Tensor grad_logps, Tensor? grad_entropy"
#define IGRPO_CONSTANTS                                                                                       \
  "Tensor advantages, Tensor loss_weight, Tensor? old_logps, Tensor? ref_logps, Tensor? sampler, Tensor? grad_entropy, " \
  "Tensor? centre, Tensor? nll_weights, float[] objective"

STABLE_TORCH_LIBRARY_FRAGMENT(igrpo, m) {
  m.def("row_stats(Tensor logits, " IGRPO_ROWS ", " IGRPO_TRANSFORM ") -> (Tensor, Tensor, Tensor)");
  m.def("row_grad(Tensor logits, " IGRPO_ROWS ", " IGRPO_STATS ", " IGRPO_TRANSFORM ") -> Tensor");
  m.def("row_grad_(Tensor(a!) logits, " IGRPO_ROWS ", " IGRPO_STATS ", " IGRPO_TRANSFORM ") -> ()");
  m.def("token_loss(Tensor logits, " IGRPO_ROWS ", " IGRPO_CONSTANTS ", " IGRPO_TRANSFORM
        ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("token_loss_(Tensor(a!) logits, " IGRPO_ROWS ", " IGRPO_CONSTANTS ", " IGRPO_TRANSFORM
        ") -> (Tensor, Tensor, Tensor)");
  m.def("scale_(Tensor(a!) grad, Tensor factor) -> ()");  // CUDA only: on the CPU the factor can simply be looked at
  m.def("cpu_capability() -> str");
  m.def("cpu_keep_at_most(int bytes) -> int");
  m.def("cpu_new(Tensor like, int[] shape) -> Tensor");
  m.def("policy_terms() -> str");
  m.def("source_hash() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(igrpo, CPU, m) { igrpo::Operators<igrpo::Cpu>::bind(m); }

STABLE_TORCH_LIBRARY_IMPL(igrpo, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&igrpo::cpu_capability));
  m.impl("cpu_new", TORCH_BOX(&igrpo::cpu_new));
  m.impl("cpu_keep_at_most", TORCH_BOX(&igrpo::cpu_keep_at_most));
  m.impl("policy_terms", TORCH_BOX(&igrpo::policy_terms));
  m.impl("source_hash", TORCH_BOX(&igrpo::source_hash));
}
