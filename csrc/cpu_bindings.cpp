// The Python module ccl_fast/_cpu: addresses come as integers, and Python's other threads go on meanwhile.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <unordered_map>

#include "cpu.h"
#include "threads.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;
using Released = py::call_guard<py::gil_scoped_release>;

const ccl_fast::Cpu* const ALL[] = {
#ifdef __x86_64__
    &ccl_fast::cpu_512,
    &ccl_fast::cpu_256,
#endif
    &ccl_fast::cpu_128,
};

// What a thread takes at a time at least: panels of rows, as fewer would have the centres loaded more often, and products
// of entries, some fifty microseconds of them, as to wake a thread takes ten.
constexpr int64_t LEAST_PANELS = 8, LEAST_WORK = 1 << 22;
// And at most, as it has working memory for them.
constexpr int64_t MOST_PANELS = 1 << 12;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// Rows are packed first, unless `are_packed`: into `panels` and `lengths`, or, where these are null, only for this call.
// `directions` are what the rows are multiplied by: the centres, or for the cosine those of length 1.
int64_t nearest(const ccl_fast::Cpu& cpu, Address x, int64_t stride, int64_t n, int64_t d, Address origin, float scale,
                Address panels, Address lengths, bool are_packed, Address centers, Address directions, int64_t k,
                bool cosine, float rounding, float exact_rounding, Address labels, int64_t threads) {
  const int64_t padded = k + cpu.centers;
  const std::unique_ptr<float[]> aimed(new float[padded * (d + 1)]);
  float* const bias = aimed.get() + padded * d;
  const float length = cpu.aim(pointer<float>(directions), k, d, pointer<float>(origin), cosine ? 1.0f : scale, cosine,
                               aimed.get(), bias);
  const ccl_fast::Centers all{pointer<float>(centers), k, cosine, aimed.get(), bias, length, rounding, exact_rounding};
  const int64_t size = cpu.rows * std::clamp(LEAST_WORK / (k * d * cpu.rows) + 1, LEAST_PANELS, MOST_PANELS);
  std::atomic<int64_t> unsure{0};
  ccl_fast::Helpers::share((n + size - 1) / size, threads, [&](int64_t part) {
    const int64_t first = part * size, count = std::min(size, n - first), most = count + cpu.rows;
    const float* own = pointer<float>(x) + first * stride;
    const std::unique_ptr<float[]> memory(new float[most * (panels ? 4 : d + 5)]);
    float* own_lengths = panels ? pointer<float>(lengths) + first : memory.get() + 4 * most;
    float* own_panels = panels ? pointer<float>(panels) + first * d : memory.get() + 5 * most;
    if (!are_packed) cpu.pack(own, stride, count, d, pointer<float>(origin), scale, own_panels, own_lengths);
    unsure += cpu.nearest(own, stride, count, d, own_panels, own_lengths, all, memory.get(),
                          pointer<int64_t>(labels) + first);
  });
  return unsure;
}

void add(const ccl_fast::Cpu& cpu, Address x, int64_t stride, int64_t n, int64_t d, Address weights, Address labels,
         Address sums, Address totals) {
  cpu.add(pointer<float>(x), stride, n, d, pointer<float>(weights), pointer<int64_t>(labels), pointer<double>(sums),
          pointer<double>(totals));
}

void distance(const ccl_fast::Cpu& cpu, Address x, int64_t stride, int64_t n, int64_t d, Address centers, Address labels,
              Address distances) {
  cpu.distance(pointer<float>(x), stride, n, d, pointer<float>(centers), pointer<int64_t>(labels),
               pointer<float>(distances));
}

void unit_rows(const ccl_fast::Cpu& cpu, Address x, int64_t stride, int64_t n, int64_t d, double largest_inverse,
               Address unit, Address inverse) {
  cpu.unit_rows(pointer<float>(x), stride, n, d, largest_inverse, pointer<float>(unit), pointer<float>(inverse));
}

void unit_rows_gradient(const ccl_fast::Cpu& cpu, Address gradient, int64_t stride, int64_t n, int64_t d, Address unit,
                        Address inverse, Address result) {
  cpu.unit_rows_gradient(pointer<float>(gradient), stride, n, d, pointer<float>(unit), pointer<float>(inverse),
                         pointer<float>(result));
}

void contrast(const ccl_fast::Cpu& cpu, Address logits, int64_t n, int64_t shift, bool both, double factor, Address loss) {
  const std::unique_ptr<float[]> state(new float[4 * n]);
  *pointer<float>(loss) = float(factor * cpu.contrast(pointer<float>(logits), n, shift, both, state.get()));
}

// Returns what the sum of the losses is multiplied by: one over those that have a positive, if the mean is asked for.
double supervised(const ccl_fast::Cpu& cpu, Address logits, int64_t n, int64_t m, Address ids, double center_weight,
                  bool inside, bool mean, Address loss) {
  const std::unique_ptr<float[]> state(new float[2 * n]);
  const std::unique_ptr<int32_t[]> numbers(new int32_t[2 * n]);
  int32_t *group = numbers.get(), *center = group + n;
  std::unordered_map<int64_t, int32_t> groups;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t id = pointer<int64_t>(ids)[i];
    group[i] = groups.emplace(id, int32_t(groups.size())).first->second;
    center[i] = id >= 0 && id < m - n ? int32_t(n + id) : -1;
  }
  int64_t present;
  const double sum = cpu.supervised(pointer<float>(logits), n, m, group, center, float(center_weight), inside, state.get(),
                                    &present);
  const double factor = mean ? 1.0 / double(std::max<int64_t>(present, 1)) : 1.0;
  *pointer<float>(loss) = float(factor * sum);
  return factor;
}

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  py::class_<ccl_fast::Cpu>(module, "Cpu")
      .def_readonly("bytes", &ccl_fast::Cpu::bytes)
      .def_readonly("rows", &ccl_fast::Cpu::rows)
      .def_readonly("centers", &ccl_fast::Cpu::centers)
      .def("nearest", &nearest, Released())
      .def("add", &add, Released())
      .def("distance", &distance, Released())
      .def("unit_rows", &unit_rows, Released())
      .def("contrast", &contrast, Released())
      .def("supervised", &supervised, Released())
      .def("unit_rows_gradient", &unit_rows_gradient, Released());
  // Those that run here, the widest first.
  py::list cpus;
  for (const ccl_fast::Cpu* cpu : ALL)
    if (cpu->runs_here()) cpus.append(py::cast(cpu, py::return_value_policy::reference));
  module.attr("cpus") = cpus;
}
