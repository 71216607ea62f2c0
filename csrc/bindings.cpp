// The Python module over the C interface: addresses come as integers, errors go as exceptions.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "kmeans.h"

#ifdef CCL_FAST_EMULATE
#include "device.cuh"
#endif

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void check(int code, const char* what) {
  if (code) throw std::runtime_error(std::string(what) + ": " + ccl_error_string(code));
}

void pack(Address x, int dtype, int64_t problems, int64_t rows, int64_t d, int metric, Address origin, Address scale,
          int64_t padded_rows, int64_t padded_d, Address packed, Address norm, Address residue, Address half_square,
          int device, Address stream) {
  check(ccl_kmeans_pack(pointer<void>(x), dtype, problems, rows, d, metric, pointer<float>(origin), pointer<float>(scale),
                        padded_rows, padded_d, pointer<void>(packed), pointer<float>(norm), pointer<float>(residue),
                        pointer<float>(half_square), device, pointer<void>(stream)),
        "kmeans_pack");
}

void assign(Address x, Address x_norm, Address x_residue, Address centers, Address half_square, Address tile_norm,
            Address tile_residue, int64_t problems, int64_t rows, int64_t padded_clusters, int64_t padded_d,
            Address labels, Address unsure, Address rivals, Address others, Address unsure_count, int device,
            Address stream) {
  check(ccl_kmeans_assign(pointer<void>(x), pointer<float>(x_norm), pointer<float>(x_residue), pointer<void>(centers),
                          pointer<float>(half_square), pointer<float>(tile_norm), pointer<float>(tile_residue), problems,
                          rows, padded_clusters, padded_d, pointer<int64_t>(labels), pointer<int32_t>(unsure),
                          pointer<int32_t>(rivals), pointer<float>(others), pointer<int32_t>(unsure_count), device,
                          pointer<void>(stream)),
        "kmeans_assign");
}

void runoff(Address x, int dtype, Address centers, int64_t rows, int64_t clusters, int64_t d, int metric, Address origin,
            Address scale, Address unsure, Address rivals, Address others, Address unsure_count, Address labels,
            Address open, Address open_count, int64_t blocks, int device, Address stream) {
  check(ccl_kmeans_runoff(pointer<void>(x), dtype, pointer<float>(centers), rows, clusters, d, metric,
                          pointer<float>(origin), pointer<float>(scale), pointer<int32_t>(unsure),
                          pointer<int32_t>(rivals), pointer<float>(others), pointer<int32_t>(unsure_count),
                          pointer<int64_t>(labels), pointer<int32_t>(open), pointer<int32_t>(open_count), blocks, device,
                          pointer<void>(stream)),
          "kmeans_runoff");
}

void recheck(Address x, int dtype, Address centers, int64_t rows, int64_t clusters, int64_t d, int metric, Address open,
             Address open_count, Address labels, int64_t blocks, int device, Address stream) {
  check(ccl_kmeans_recheck(pointer<void>(x), dtype, pointer<float>(centers), rows, clusters, d, metric,
                           pointer<int32_t>(open), pointer<int32_t>(open_count), pointer<int64_t>(labels), blocks,
                           device, pointer<void>(stream)),
        "kmeans_recheck");
}

void update(Address x, int dtype, int64_t clusters, int64_t d, Address order, Address offsets, Address piece_offsets,
            int64_t pieces, Address weights, Address partial, Address partial_weight, Address sums, Address total_weight,
            int device, Address stream) {
  check(ccl_kmeans_update(pointer<void>(x), dtype, clusters, d, pointer<int64_t>(order), pointer<int64_t>(offsets),
                          pointer<int64_t>(piece_offsets), pieces, pointer<float>(weights), pointer<double>(partial),
                          pointer<double>(partial_weight), pointer<double>(sums), pointer<double>(total_weight), device,
                          pointer<void>(stream)),
        "kmeans_update");
}

void distance(Address x, int dtype, Address centers, Address labels, int64_t problems, int64_t rows, int64_t clusters,
              int64_t d, int metric, Address out, int device, Address stream) {
  check(ccl_kmeans_distance(pointer<void>(x), dtype, pointer<float>(centers), pointer<int64_t>(labels), problems, rows,
                            clusters, d, metric, pointer<float>(out), device, pointer<void>(stream)),
        "kmeans_distance");
}

}  // namespace

#ifdef CCL_FAST_EMULATE
PYBIND11_MODULE(_cuda_emulated, module) {
  module.attr("emulated") = true;
  module.def("set_schedule", &ccl_fast::set_schedule, py::arg("seed"));
  module.def("set_addition", &ccl_fast::set_addition, py::arg("addends"));
#else
PYBIND11_MODULE(_cuda, module) {
  module.attr("emulated") = false;
#endif
  module.attr("FLOAT32") = int(CCL_FLOAT32);
  module.attr("FLOAT16") = int(CCL_FLOAT16);
  module.attr("BFLOAT16") = int(CCL_BFLOAT16);
  module.attr("EUCLIDEAN") = int(CCL_EUCLIDEAN);
  module.attr("COSINE") = int(CCL_COSINE);
  module.attr("PAD_COLUMNS") = int(CCL_PAD_COLUMNS);
  module.attr("PAD_CENTERS") = int(CCL_PAD_CENTERS);
  module.def("kmeans_pack", &pack);
  module.def("kmeans_assign", &assign);
  module.def("kmeans_runoff", &runoff);
  module.def("kmeans_recheck", &recheck);
  module.def("kmeans_update", &update);
  module.def("kmeans_distance", &distance);
}
