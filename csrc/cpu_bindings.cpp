// The Python module ccl_fast/_cpu: addresses come as integers, and Python's other threads go on meanwhile.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu.h"

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

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

int64_t nearest(const ccl_fast::Cpu& cpu, Address rows, int64_t n, int64_t d, Address centers, Address half_square,
                int64_t k, Address margin, Address state, Address labels, Address unsure) {
  return cpu.nearest(pointer<float>(rows), n, d, pointer<float>(centers), pointer<float>(half_square), k,
                     pointer<float>(margin), pointer<float>(state), pointer<int64_t>(labels), pointer<int32_t>(unsure));
}

void pack(const ccl_fast::Cpu& cpu, Address x, int64_t stride, int64_t n, int64_t d, Address origin, float scale,
          int64_t width, Address panels, Address length) {
  cpu.pack(pointer<float>(x), stride, n, d, pointer<float>(origin), scale, width, pointer<float>(panels),
           pointer<float>(length));
}

void decide(const ccl_fast::Cpu& cpu, Address x, int64_t stride, Address numbers, int64_t count, int64_t d,
            Address centers, int64_t k, bool cosine, Address labels) {
  cpu.decide(pointer<float>(x), stride, pointer<int32_t>(numbers), count, d, pointer<float>(centers), k, cosine,
             pointer<int64_t>(labels));
}

void add(const ccl_fast::Cpu& cpu, Address x, int64_t stride, int64_t n, int64_t d, Address weights, Address labels,
         Address sums) {
  cpu.add(pointer<float>(x), stride, n, d, pointer<float>(weights), pointer<int64_t>(labels), pointer<double>(sums));
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

}  // namespace

PYBIND11_MODULE(_cpu, module) {
  py::class_<ccl_fast::Cpu>(module, "Cpu")
      .def_readonly("bytes", &ccl_fast::Cpu::bytes)
      .def_readonly("rows", &ccl_fast::Cpu::rows)
      .def_readonly("centers", &ccl_fast::Cpu::centers)
      .def("pack", &pack, Released())
      .def("nearest", &nearest, Released())
      .def("decide", &decide, Released())
      .def("add", &add, Released())
      .def("distance", &distance, Released())
      .def("unit_rows", &unit_rows, Released())
      .def("unit_rows_gradient", &unit_rows_gradient, Released());
  // Those that run here, the widest first.
  py::list cpus;
  for (const ccl_fast::Cpu* cpu : ALL)
    if (cpu->runs_here()) cpus.append(py::cast(cpu, py::return_value_policy::reference));
  module.attr("cpus") = cpus;
}
