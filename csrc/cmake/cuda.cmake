# CUDA, by KEXUE_BUILD_CUDA: 0 off, 1 required, auto if nvcc is found and compiles.
# Sets `cuda_found`, `cuda_archs` and `cuda_families`.
file(GLOB cuda_sources CONFIGURE_DEPENDS */*_cuda.cu)
file(GLOB cuda_binding_sources CONFIGURE_DEPENDS RELATIVE ${CMAKE_CURRENT_SOURCE_DIR}
     */bindings_cuda.cpp)
file(GLOB more_cuda_binding_sources CONFIGURE_DEPENDS */*_bindings_cuda.cpp)
set(cuda_found OFF)
set(cuda_archs "")
set(cuda_families "")

if(NOT KEXUE_BUILD_CUDA STREQUAL "0" AND cuda_sources AND cuda_binding_sources)
  set(CMAKE_CUDA_ARCHITECTURES OFF)  # the flags below say it all
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(cuda_found ON)
  endif()
endif()
if(KEXUE_BUILD_CUDA STREQUAL "1" AND NOT cuda_found)
  message(FATAL_ERROR "KEXUE_BUILD_CUDA=1: no working nvcc, or no CUDA sources")
endif()

# "sm_80;sm_90a" (or "80 90a", or with commas) -> 80;90a, by default those nvcc knows.
function(kexue_cuda_archs out)
  string(REGEX REPLACE "[ ,]+" ";" wanted "${KEXUE_CUDA_ARCHS}")
  list(TRANSFORM wanted REPLACE "^(sm_|compute_)" "")
  list(REMOVE_ITEM wanted "")
  if(NOT wanted)
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known)
    foreach(arch 80 90a 100)
      string(REGEX REPLACE "[af]$" "" plain ${arch})
      if(known MATCHES "compute_${plain}[^0-9]")
        list(APPEND wanted ${arch})
      endif()
    endforeach()
  endif()
  foreach(arch ${wanted})
    if(NOT arch MATCHES "^[0-9]+[af]?$")
      message(FATAL_ERROR "KEXUE_CUDA_ARCHS: expected names such as sm_90a, got ${arch}")
    endif()
  endforeach()
  list(SORT wanted COMPARE NATURAL)
  set(${out} ${wanted} PARENT_SCOPE)
endfunction()

if(cuda_found)
  kexue_cuda_archs(cuda_archs)
  foreach(arch ${cuda_archs})
    list(APPEND gencode "-gencode=arch=compute_${arch},code=sm_${arch}")
  endforeach()
  # PTX of the newest, for devices to come: not of an "a" variant, which runs nowhere else.
  list(GET cuda_archs -1 newest)
  string(REGEX REPLACE "[af]$" "" newest ${newest})
  list(APPEND gencode "-gencode=arch=compute_${newest},code=compute_${newest}")
  list(APPEND gencode "--threads=2")  # two architectures at a time: one source can take minutes
  list(TRANSFORM cuda_archs PREPEND "sm_")
  list(APPEND cuda_archs "compute_${newest}")

  set_source_files_properties(${cuda_sources} PROPERTIES COMPILE_OPTIONS "${gencode}")
  target_sources(
    _C PRIVATE ${cuda_sources} ${cuda_binding_sources} ${more_cuda_binding_sources})
  set_target_properties(_C PROPERTIES CUDA_ARCHITECTURES OFF CUDA_VISIBILITY_PRESET hidden
                                      CUDA_RUNTIME_LIBRARY Static)
  # of these alone, so that the other objects are the same with CUDA and without
  set_source_files_properties(
    ${cuda_binding_sources} ${more_cuda_binding_sources}
    PROPERTIES INCLUDE_DIRECTORIES "${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}")
  set(cuda_families ${cuda_binding_sources})
  list(TRANSFORM cuda_families REPLACE "/bindings_cuda.cpp$" "")
endif()
