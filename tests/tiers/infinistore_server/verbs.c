/* One RDMA device that is none: preloaded into InfiniStore's server, which does not start without a device
   even where it is only reached over TCP. Memory is "registered" by answering with a number; everything that
   would move a byte by RDMA is missing, and ends the server.

   Written against the ABI of libibverbs (IBVERBS_1.1), without its headers. */

#include <stdlib.h>
#include <string.h>

#define LINK_LAYER 46 /* offset of link_layer in struct ibv_port_attr */
#define INFINIBAND 1

static char device[4096], context[4096], domain[64]; /* zeros: "not extended", so plain calls are made */
static void *devices[2] = {device, NULL};

void **ibv_get_device_list(int *count) {
    *count = 1;
    return devices;
}

void ibv_free_device_list(void **list) { (void)list; }

const char *ibv_get_device_name(void *which) {
    (void)which;
    return "fake_0";
}

void *ibv_open_device(void *which) {
    (void)which;
    return context;
}

int ibv_close_device(void *which) {
    (void)which;
    return 0;
}

int ibv_query_port(void *which, unsigned char port, void *attributes) {
    (void)which;
    (void)port;
    memset(attributes, 0, 48);
    ((char *)attributes)[LINK_LAYER] = INFINIBAND;
    return 0;
}

void *ibv_alloc_pd(void *which) {
    (void)which;
    return domain;
}

int ibv_dealloc_pd(void *which) {
    (void)which;
    return 0;
}

void *ibv_reg_mr(void *which, void *address, size_t length, int access) {
    (void)which;
    (void)address;
    (void)length;
    (void)access;
    return calloc(1, 64); /* struct ibv_mr, with keys 0 */
}

int ibv_dereg_mr(void *region) {
    free(region);
    return 0;
}
